"""Step graphs for Dask: lowered from commands, submitted, watched, forgotten.

May import: `graphs`, `records`, `policies`, `messages`, and the `commands` of the state machine.
May not touch: the ledger and requests; it only carries out commands.
"""
