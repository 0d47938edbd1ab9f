"""Documents and chats as users hold them, their prompts, and how they are saved and loaded.

Imports the ground, the session, and of the client what reads files and makes token ids of texts.
It knows no engine, no batches and no commands.
"""
