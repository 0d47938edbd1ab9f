"""Batches: a table or folder of documents in, a table of answers out, resumable at any time.

May import: `session`, `documents`, `models`, `messages`, and modules of `client` that read files and make prompts.
May not touch: engines and commands; a batch gets a session.
"""
