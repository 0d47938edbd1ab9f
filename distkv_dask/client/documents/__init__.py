"""Documents and chats for users, their prompts, and how they are saved and loaded.

May import: `session`, `messages`, and modules of `client` that read files and encode texts.
May not touch: engines, batches and commands.
"""
