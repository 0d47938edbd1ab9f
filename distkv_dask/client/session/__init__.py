"""Requests and answers between a user and an engine; opening and closing; schedulers that stop.

May import: `messages`, `models`, modules of `client` that encode texts and keep traces, and the plugin of `scheduler`.
May not touch: documents, batches and commands, which build on it.
"""
