"""Moves of blocks while their sequences decode, and draining of workers before they leave.

May import: `work`, `cache`, `records`, `ledger` and `messages`.
May not touch: a request's state; the policy decides what moves.
"""
