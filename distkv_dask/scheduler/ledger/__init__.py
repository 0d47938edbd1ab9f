"""The debt ledger: who holds how many blocks of which sequence, for whom. Pure bookkeeping.

May import: no other package of the scheduler.
May not touch: requests, clocks, messages; the lifecycle keeps it up to date.
"""
