"""Channels: bytes of queries and partials straight from worker to worker; one contract, one implementation a file.

May import: the modules outside of the folders, `messages`.
May not touch: pools and plans; a channel carries bytes, whatever they mean.
"""
