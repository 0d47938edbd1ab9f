"""The home's side: the lane that runs forwards, and attention that queries holders and merges their partials.

May import: `blocks`, `by_layer`, `channels`, `model`, `native`, `kernels`, `messages`, modules of the `worker` beside
it; for types only: `stages`.
May not touch: other workers' pools, and the event loop; it runs on the home lane.
"""
