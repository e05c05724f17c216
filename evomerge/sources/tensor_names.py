"""From the name of a tensor to its layer and its component (attention, mlp, norm, ...): `tensor_role`."""

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

Component = Literal["attention", "mixer", "mlp", "norm", "embedding", "head", "vision", "audio", "projector", "other"]
"""mixer: a state-space, convolutional or recurrent layer in the position of attention.
mlp: includes experts and routers.
projector: connects a vision or audio tower to the language model."""
COMPONENTS: tuple[Component, ...] = get_args(Component)
Part = Literal["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"]
"""The matrices of which most models make attention and mlp.  A matrix that joins several of them, such as one for q, k
and v together, is no part."""
PARTS: tuple[Part, ...] = get_args(Part)

KNOWN_MODEL_TYPES = frozenset(
    """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text gpt2 gpt_neox phi phi3 mixtral qwen2_moe qwen3_moe
    olmo olmo2 stablelm smollm3
    qwen2_vl qwen2_5_vl qwen3_vl qwen3_5 qwen3_next jamba bamba falcon_h1 granitemoehybrid lfm2
    """.split()
)

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
TOWERS: tuple[Component, ...] = ("vision", "audio", "projector")
BEFORE_THE_LAYERS = ("embedding", *TOWERS)
ANY_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
# The encoder of an encoder-decoder.  BERT's only stack is called `encoder.layer`, CPM-Ant's `cpmant.encoder.layers`.
ENCODER = re.compile(r"(?:^|\.)(?<!cpmant\.)(?:text_)?encoder\.(?:text_model\.)?(?:layers|block)\.(\d+)\.")
# Numbered modules that are not layers of the decoder: multi-token prediction, cross attention between layers, BLT.
NO_LAYER = re.compile(
    r"(?:^|\.)(?:mtp|altup_\w+|\w*cross_attn_layers|local_encoder|local_decoder|patcher|depth_decoder|dit)\."
)
# A module outside the language model.  Where several match, the outermost one decides.
TOWER = re.compile(
    r"(?:^|\.)(?:"
    r"(?P<projector>\w*projector|mm_projector|connector|merger|resampler|perceiver|\w*aligner|qformer|query_tokens|abstractor"
    r"|(?:language|visual|vision|audio|text|image_to_text|multimodal)_projection|vision_adapter|embed_vision|embed_audio"
    r"|image_newline|view_seperator|view_separator|patch_merger)"
    r"|(?P<vision>vision\w*|visual\w*|image_\w+|img_\w+|vqmodel|video_\w+|sam_\w+|high_res_\w+|vit\w+|(?<=\.)vit)"
    r"|(?P<audio>audio\w*|speech_\w+|acoustic_\w+|semantic_\w+|codec_model|token2wav|code2wav|talker|word_timestamp_\w+)"
    r")(?:\.|$)"
)

# The first pattern that matches decides: `post_attention_layernorm` and `q_norm` are norms, not attention.
COMPONENT_PATTERNS: tuple[tuple[Component, re.Pattern[str]], ...] = (
    ("head", re.compile(
        r"(?:^|\.)(?:lm_head|embed_out|output_projection|final_logits_bias|lm_loss|pred_layer|generator_\w+|proj_out)(?:\.|$)"
        r"|(?:^|\.)cls\.predictions|^(?:output|head)\.|^decoder\.(?:weight|bias)$")),
    ("embedding", re.compile(
        r"(?:^|\.)(?:embed_tokens|embed_in|wte|wpe|word_embeddings|word_embedding|tok_embeddings|shared)\.")),
    ("norm", re.compile(r"(?i:norm)|(?:^|[._])ln_?(?:\d|f|q|pre|post|out)?\.")),
    ("mlp", re.compile(r"(?:^|\.)mixer\.(?:gate|fc\d|up_proj|down_proj)\.|(?:^|\.)\w*experts?(?:\.|$)")),
    ("attention", re.compile(r"(?i:attn|attention)|(?:^|\.)(?:mixer|temporal_block)\.[qkvo]_proj\.")),
    ("mixer", re.compile(
        r"(?:^|\.)(?:\w*mamba\w*|\w*mixer|ssm|mlstm_layer|slstm_layer|xlstm|temporal_block|time_mix\w*|conv|short_conv|recurrent)"
        r"(?:\.|$)")),
    ("mlp", re.compile(
        r"mlp|(?:^|\.)(?:feed_forward|\w*ffns?|\w*moe|router|gate|ffn_\w+|ff\d?|fc\d|intermediate|output|DenseReluDense|dense_\w+"
        r"|feedforward|lin\d)(?:\.|$)")),
    ("embedding", re.compile(r"(?i:embed)|\.(?:segment|mask)_emb(?:\.|$)|^transformer\.w\.")),
)  # fmt: skip


PART_PATTERNS: tuple[tuple[Part, re.Pattern[str]], ...] = (
    ("attention.q", re.compile(r"(?:^|[._])(?:q|wq|query|q_proj|q_lin)\.")),
    ("attention.k", re.compile(r"(?:^|[._])(?:k|wk|key|k_proj|k_lin)\.")),
    ("attention.v", re.compile(r"(?:^|[._])(?:v|wv|value|v_proj|v_lin)\.")),
    ("attention.o", re.compile(r"(?:^|[._])(?:o|wo|o_proj|out_proj|out_lin|c_proj|dense)\.")),
    ("mlp.gate", re.compile(r"\.(?:gate_proj|w1|wi_0)\.")),
    ("mlp.up", re.compile(r"\.(?:up_proj|w3|wi_1|wi|c_fc|fc1|fc_in|dense_h_to_4h)\.")),
    ("mlp.down", re.compile(r"\.(?:down_proj|w2|wo|c_proj|fc2|fc_out|dense_4h_to_h)\.")),
)


@dataclass(frozen=True)
class TensorRole:
    """The layer and the component that a tensor belongs to.

    layer: its layer in the decoder (or in the only stack of layers), from 0; None for embeddings, final norm, head,
        vision and audio towers, and the encoder of an encoder-decoder.
    component: the kind of module.
    tensor: the tensor's name, which the filters of a recipe look at; it is ignored when two roles are compared.
    encoder_layer: its layer in the encoder of an encoder-decoder.
    part: which matrix of attention or mlp it is; None for any other tensor.
    """

    layer: int | None
    component: Component
    tensor: str = field(default="", compare=False)
    encoder_layer: int | None = None
    part: Part | None = None

    @property
    def finest(self) -> Component | Part:
        """The part, or for a tensor that is none, the component."""
        return self.part or self.component


@lru_cache(maxsize=65536)
def tensor_role(name: str) -> TensorRole:
    """The layer and the component of the checkpoint tensor called `name`."""
    if tower := TOWER.search(name):
        return TensorRole(None, tower.lastgroup, name)  # type: ignore[arg-type]
    component: Component = next((c for c, pattern in COMPONENT_PATTERNS if pattern.search(name)), "other")
    part = next((p for p, pattern in PART_PATTERNS if p.startswith(f"{component}.") and pattern.search(name)), None)
    if encoder := ENCODER.search(name):
        return TensorRole(None, component, name, int(encoder.group(1)), part)
    layer = None if NO_LAYER.search(name) else LAYER.search(name) or ANY_NUMBER.search(name)
    return TensorRole(int(layer.group(1)) if layer else None, component, name, None, part)


def coefficient_key(finest: str, keys: Container[str]) -> str:
    """Which of the keys of a coefficient holds for a tensor: its part, else its component, else `default`.

    finest: `TensorRole.finest`.
    """
    component = finest.split(".")[0]
    return finest if finest in keys else component if component in keys else "default"


def layer_count(names: list[str]) -> int:
    """The number of layers in the decoder of a checkpoint with these tensor names.

    Returns the layers of the encoder if there is no decoder, and 0 if no name has a layer number.
    """
    roles = [tensor_role(name) for name in names]
    decoder = [role.layer for role in roles if role.layer is not None]
    return 1 + max(decoder or [r.encoder_layer for r in roles if r.encoder_layer is not None], default=-1)


def towers_beside_decoder(names: Iterable[str]) -> list[Component]:
    """The components of a checkpoint that lie outside its language model; none if it has no decoder.

    names: of the checkpoint's tensors.
    """
    roles = [tensor_role(name) for name in names]
    if all(role.layer is None for role in roles):
        return []
    return [c for c in TOWERS if any(role.component == c for role in roles)]


def name_in_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer.  name: of a tensor that belongs to a layer."""
    found = LAYER.search(name) or ANY_NUMBER.search(name)
    assert found is not None, f"{name} is in no layer"
    start, end = found.span(1)
    return f"{name[:start]}{layer}{name[end:]}"


def coefficient_layer(role: TensorRole, layers: int) -> int:
    """The layer whose coefficients a tensor uses, in a decoder of `layers` layers.

    A tensor of a layer uses its own layer.  What comes before the layers (embeddings, towers) uses the first, what
    follows them (final norm, head) the last.  A layer of an encoder uses the decoder's layer of the same number.

    mergekit gives the final norm and the head the first layer's value; `merge/mergekit/` converts its files.
    """
    if role.layer is not None:
        return role.layer
    last = max(layers - 1, 0)
    if role.encoder_layer is not None:
        return min(role.encoder_layer, last)
    return 0 if role.component in BEFORE_THE_LAYERS else last


COMPUTED_BUFFERS = re.compile(
    r"\.(?:attn|attention)\.bias$|\.masked_bias$|(?:^|\.)rope\.freqs$|\.num_batches_tracked$|(?:^|\.)(?:position_ids|token_type_ids)$"
    r"|\.rotary_(?:emb|embeddings?|pos_emb)\.(?:original_)?(?:inv_freq|cos_cached|sin_cached)$"
)


def is_computed_buffer(name: str) -> bool:
    """Whether a tensor is a buffer that old checkpoints store and transformers now computes.

    Such buffers are causal masks, position ids and rotary frequencies.  Counters that only training reads count too.
    """
    return COMPUTED_BUFFERS.search(name) is not None
