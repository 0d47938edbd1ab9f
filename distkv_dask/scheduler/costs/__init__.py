"""Costs of a step, a chunk or a copy on each worker: fitted from timings, calibrated by windows.

May import: `ledger`, to see where sequences are.
May not touch: placements; policies decide with these costs.
"""
