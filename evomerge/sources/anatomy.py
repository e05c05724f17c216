"""Anatomy: which layer and which component a tensor belongs to, read from its name."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

Component = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
COMPONENTS: tuple[Component, ...] = get_args(Component)

KNOWN_MODEL_TYPES = frozenset(
    """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text gpt2 gpt_neox phi phi3 mixtral qwen2_moe qwen3_moe
    olmo olmo2 stablelm smollm3
    """.split()
)

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
ANY_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")

# The first pattern that matches decides: `post_attention_layernorm` and `q_norm` are norms, not attention.
COMPONENT_PATTERNS: tuple[tuple[Component, re.Pattern[str]], ...] = (
    ("head", re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection)\.")),
    ("embedding", re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|wpe|word_embeddings|tok_embeddings)\.")),
    ("norm", re.compile(r"norm|(?:^|\.)ln_(?:\d|f)")),
    ("attention", re.compile(r"(?:^|\.)(?:self_attn|attn|attention|self_attention)\.")),
    ("mlp", re.compile(r"(?:^|\.)(?:mlp|feed_forward|ffn|block_sparse_moe|moe|experts)\.")),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor sits.  layer: index from 0, None outside the stack (embeddings, final norm, head).

    tensor: its name, which recipes may name in part; places are equal whatever their tensors are called.
    """

    layer: int | None
    component: Component
    tensor: str = field(default="", compare=False)


@lru_cache(maxsize=65536)
def place(name: str) -> Place:
    """The place of the tensor called `name` in a checkpoint."""
    layer = LAYER.search(name) or ANY_NUMBER.search(name)
    component: Component = next((c for c, pattern in COMPONENT_PATTERNS if pattern.search(name)), "other")
    return Place(int(layer.group(1)) if layer else None, component, name)


def layer_count(names: list[str]) -> int:
    """How many layers a checkpoint with these tensor names has; 0 if none carries a layer index."""
    return 1 + max((p.layer for p in map(place, names) if p.layer is not None), default=-1)


def at_layer(name: str, layer: int) -> str:
    """The name that a tensor of the stack has in another layer."""
    found = LAYER.search(name) or ANY_NUMBER.search(name)
    assert found is not None, f"{name} is in no layer"
    start, end = found.span(1)
    return f"{name[:start]}{layer}{name[end:]}"


def relative_depth(where: Place, layers: int) -> int:
    """The layer whose coefficients a tensor uses: its own, the first for embeddings, the last for what follows
    the stack (final norm, head).  mergekit's gradients give those the first layer's too; `merge/mergekit/` says how
    its files are read all the same."""
    if where.layer is not None:
        return where.layer
    return 0 if where.component == "embedding" else max(layers - 1, 0)


COMPUTED = re.compile(
    r"\.(?:attn|attention)\.bias$|\.masked_bias$|(?:^|\.)rope\.freqs$|\.num_batches_tracked$|(?:^|\.)(?:position_ids|token_type_ids)$"
    r"|\.rotary_(?:emb|embeddings?|pos_emb)\.(?:original_)?(?:inv_freq|cos_cached|sin_cached)$"
)


def is_computed(name: str) -> bool:
    """Tables that old checkpoints store and transformers now computes: causal masks, positions, rotary frequencies;
    and counters that only training reads."""
    return COMPUTED.search(name) is not None
