"""An engine behind OpenAI's HTTP API: chats, completions, models, files and batches.

Imports the session and the batches of the client, Starlette and uvicorn (extra ``serve``).
It knows no commands, and opens no engine: it is given one that is open.
"""
