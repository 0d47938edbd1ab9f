"""Models before torch: where their files are, what those say, and whether we compute what they need.

May import: errors, transformers' configurations and tokenizers; every process imports this.
May not touch: weights, but to convert a GGUF file once; `worker/model` loads them.
"""
