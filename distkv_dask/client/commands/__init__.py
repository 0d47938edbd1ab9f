"""The commands of ``distkv``, one a file.

May import: everything of the client, and what it prints.
May not touch: anything before all that the user said has been checked.
"""
