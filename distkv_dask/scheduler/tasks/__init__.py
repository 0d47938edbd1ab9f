"""Step graphs on their way into Dask: lowered from commands, submitted, watched, forgotten.

May import: `graphs`, and the commands and plans of the scheduler.
May not touch: the ledger and requests; it only carries out commands.
"""
