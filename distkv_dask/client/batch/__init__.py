"""Batches: a table or folder of documents in, a table of answers out, and nothing lost on the way.

Imports the ground, the session, and of documents and the client what reads files and makes prompts.
It knows no engine and no commands.
"""
