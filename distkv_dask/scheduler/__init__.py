"""What runs in the Dask scheduler: the gManager and the state machine of each engine.

May import: `graphs` and the modules outside of the folders; never `worker` (but the plugin's name), never torch.
May not touch: event loops, by blocking them; the KV itself, which only workers have.
"""
