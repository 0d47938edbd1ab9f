"""How fast this worker is: short timings, kept on this machine by model and hardware.

May import: `blocks`, `channels`, `kernels`, and the worker's runtime.
May not touch: open engines; it runs before one opens.
"""
