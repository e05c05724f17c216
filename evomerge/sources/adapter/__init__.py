"""A LoRA adapter (PEFT format) as a source of a merge.

    peft_config.py       adapter_config.json: every key is honoured, has no effect on merged weights, or is refused
    adapter_file.py      adapter_model.safetensors: its tensors, sorted by the module that they adapt
    parameter_names.py   from a parameter's name in memory to the tensors of the base checkpoint
    lora_factors.py      the matrices A and B of one adapted parameter, in the layout of that parameter
    lora_to_changes.py   joins these: the change that the adapter makes to each tensor of the base
    tensor_change.py     the change of one tensor, and how it is applied: scale * B A in float32
    adapter.py           opens all this as a source that is read tensor by tensor

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; rank-stabilised scaling: Kalajdzievski 2023.

In shapes, R is the rank of an adapted parameter.
"""

from evomerge.sources.adapter.adapter import Adapter, open_adapter

__all__ = ["Adapter", "open_adapter"]
