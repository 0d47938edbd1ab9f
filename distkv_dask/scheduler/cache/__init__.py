"""KV that outlives one answer, or a loss: documents, the prefix cache, copies on disks, repair.

May import: `records`, `ledger`, `policies`, `costs` and `messages`.
May not touch: a request's state; it recommends the next one.
"""
