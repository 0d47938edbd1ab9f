"""What the state machine knows of one engine, as plain records: requests and their states, homes, moves, disks.

May import: `ledger`, `policies`, `costs`.
May not touch: each other, or workers; the rooms that act (`work`, `cache`, `moves`, `lifecycle`) are functions of them.
"""
