"""Everything that travels between client, gManager and rManagers, each message spelled once and sent as it is.

May import: the modules outside of the folders (`types`, `errors`, `config`).
May not touch: Dask's comms; whoever sends a message packs it (`names.pack`).
"""
