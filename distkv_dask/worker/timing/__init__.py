"""How fast this worker is: short timings, kept on this machine by model and hardware.

May import: `home`, `blocks`, `model`, whatever runs a step.
May not touch: engines; it times before one is open.
"""
