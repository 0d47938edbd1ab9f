"""The same attention in one Dask task per layer and worker: slow, visible, the oracle of the fast way.

May import: `home`, `holder`, `blocks`, and graphs' tasks.
May not touch: channels; bytes travel with tasks here.
"""
