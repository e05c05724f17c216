"""A LoRA adapter (PEFT format) as a source: its configuration, the names in its file, what it changes.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; rank-stabilised scaling: Kalajdzievski 2023.
"""

from evomerge.sources.adapter.adapter import Adapter, open_adapter

__all__ = ["Adapter", "open_adapter"]
