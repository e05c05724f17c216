"""evomerge searches for the best way to merge fine-tuned language models, and proves the result."""

__version__ = "0.1.0"
