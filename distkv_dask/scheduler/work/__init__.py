"""The work of homes: chunks of prompts, decode windows and their gangs.

May import: `cache` (snapshots), `records`, `policies`, `costs`, `ledger` and `messages`.
May not touch: a request's state; it recommends the next one.
"""
