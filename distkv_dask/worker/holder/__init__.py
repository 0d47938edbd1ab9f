"""The holder's side: the lane that answers MicroAttention requests of all homes, and who may connect.

May import: `blocks`, `channels`, `native`, `kernels`, and modules of the `worker` beside it; for types only: `stages`.
May not touch: the model, which a holder may not have; the lane never blocks on one home.
"""
