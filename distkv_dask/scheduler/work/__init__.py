"""What homes and prompts compute: chunks of prompts, decode windows, their gangs and their length.

May import: `ledger`, `policies`, the lifecycle's state and requests.
May not touch: a request's state; it recommends the next one.
"""
