"""Between a user and an engine: requests and their answers, opening and closing, a scheduler that is gone.

Imports the ground, and of the client what makes token ids of texts and keeps traces.
It knows no documents, batches or commands: those stand on it.
"""
