"""Everything sent between client, gManager and rManagers; each message is defined once and sent unchanged.

May import: the modules outside of the packages, such as `gang` and `placement`.
May not touch: Dask's comms; senders pack their messages (`names.pack`).
"""
