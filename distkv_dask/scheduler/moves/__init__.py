"""Blocks that change their worker while requests go on, and workers that are emptied before they leave.

May import: `ledger`, `policies`, `work`, the lifecycle's state and requests.
May not touch: a request's state; what to move is the policy's decision.
"""
