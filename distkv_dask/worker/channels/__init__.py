"""Channels: bytes of queries and partials straight from worker to worker; one contract, one implementation a file."""
