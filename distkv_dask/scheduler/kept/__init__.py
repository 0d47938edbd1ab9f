"""KV that outlives one answer: documents, the prefix cache, copies on disks and in users' files.

May import: `ledger`, `policies`, `costs`, the lifecycle's state and requests.
May not touch: a request's state; it recommends the next one.
"""
