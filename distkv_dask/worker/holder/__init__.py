"""The holder's side: the lane that answers MicroAttention requests of all homes, and who is let in.

May import: `blocks`, `channels`, `native`, kernels.
May not touch: the model; a holder may have none, and never waits for anybody.
"""
