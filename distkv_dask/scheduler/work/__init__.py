"""The work of homes: chunks of prompts, decode windows and their gangs.

May import: `cache`, `records`, `policies`, `costs`, `ledger`, `commands` and `messages`.
May not touch: which state a request is in; it recommends the next one.
"""
