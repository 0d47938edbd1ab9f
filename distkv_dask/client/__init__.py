"""What runs with the user: the engine. Never imports torch."""
