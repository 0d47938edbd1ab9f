"""What is known of a model without torch: its files, its configuration, and whether it can be served.

May import: the modules outside of the packages, transformers' configurations and tokenizers.
May not touch: weights, except to convert a GGUF file once; `worker/model` loads them.
"""
