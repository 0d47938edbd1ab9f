"""An engine behind OpenAI's HTTP API: chats, completions, models, files and batches.

May import: `session`, `batch`, the `tokenizer` of prompts, Starlette and uvicorn (extra ``serve``).
May not touch: commands and engines; a server gets a session.
"""
