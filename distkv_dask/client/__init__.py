"""What runs with the user: the engine. Never imports torch.

May import: `messages` and the modules outside of the folders; of the scheduler only the plugin that it installs.
May not touch: workers and the ledger; everything goes through calls to the gManager.
"""
