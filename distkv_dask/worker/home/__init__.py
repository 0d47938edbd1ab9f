"""The home's side: the lane that runs forwards, and attention that asks holders and merges what they answer.

May import: `blocks`, `channels`, `model`, `native`, kernels and graphs.
May not touch: other workers' pools, and the event loop; it runs on the home lane.
"""
