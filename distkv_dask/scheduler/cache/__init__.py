"""KV that outlives one answer, or a loss: documents, the prefix cache, copies on disks, repair.

May import: `records`, `ledger`, `policies`, `commands` and `messages`.
May not touch: which state a request is in; it recommends the next one.
"""
