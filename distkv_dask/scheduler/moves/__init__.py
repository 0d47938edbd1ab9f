"""Blocks that change their worker while requests go on, and workers that are emptied before they leave.

May import: `work`, `cache`, `records` and what that may import.
May not touch: a request's state; what to move is the policy's decision.
"""
