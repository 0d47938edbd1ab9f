"""How fast this worker is: short timings, kept on this machine by model and hardware.

May import: `blocks`, `channels`, `kernels`, modules of the `worker` beside it; a `model`'s packed
products, and for types only the model.
May not touch: open engines; it runs before one opens.
"""
