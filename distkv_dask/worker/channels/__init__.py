"""Channels carry queries and partials from worker to worker: one contract, one implementation per file.

May import: the modules outside of the packages.
May not touch: pools and plans; a channel does not know what its bytes mean.
"""
