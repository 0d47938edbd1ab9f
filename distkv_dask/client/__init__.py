"""What runs in the user's process: the engine and the command line. Never imports torch.

May import: `messages`, `models` and the modules outside of the packages.
May not touch: workers and the ledger; everything goes through calls to the gManager.
"""
