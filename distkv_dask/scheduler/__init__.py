"""What runs in the Dask scheduler: the gManager and the state machine of each engine. Never imports torch.

May import: `messages`, the modules outside of the packages, and of `worker` only the plugin that it installs.
May not touch: KV, which only workers have. Nothing may block the event loop.
"""
