"""The commands of ``distkv``, one per file.

May import: `session`, `documents`, `batch`, `serve`, modules of `client`, `messages` and `models`; figures of `costs`.
May not touch: the cluster before all arguments have been checked.
"""
