"""The commands of ``distkv``, one a file."""
