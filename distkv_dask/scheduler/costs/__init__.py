"""What a step, a chunk, or a copy takes on each worker: fitted from timings, calibrated by windows.

May import: `ledger`, to see where sequences lie.
May not touch: placements; policies decide with these costs.
"""
