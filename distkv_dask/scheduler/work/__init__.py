"""What homes and prompts compute: chunks of prompts, decode windows and their gangs.

May import: `records` and what that may import.
May not touch: a request's state; it recommends the next one.
"""
