"""Other systems beside ours: what is asked of all, how each is driven in a process of its own, and how they compare."""
