"""The state of one engine as plain records: requests and their states, homes, moves, disks.

May import: `ledger`, `policies`, `costs` and `messages`.
May not touch: each other, or workers; `work`, `cache`, `moves` and `lifecycle` are functions of these records.
"""
