"""Moves of blocks while their sequences decode, and draining of workers before they leave.

May import: `work`, `cache`, `records`, `ledger`, `commands` and `messages`.
May not touch: which state a request is in; the policy decides what moves.
"""
