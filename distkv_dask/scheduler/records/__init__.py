"""The state of one engine as records: requests and their states, homes, moves, disks.

May import: `ledger`, `policies`, `costs`, `commands` and `messages`.
May not touch: one another; a record changes only itself. `work`, `cache`, `moves` and `lifecycle` are functions of all.
"""
