"""The configuration of a model whose layers are assembled of others': their number, and what it says of single layers.

A configuration speaks of single layers by lists (`layer_types`), by sets of indices (`moe_layers`) and by counts from
the first layer on (`first_k_dense_replace`).  All of them move with the layers.  What only a layer's position decides
cannot move, and is refused.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.sources.architecture import known_config
from evomerge.sources.checkpoint import Checkpoint
from evomerge.sources.tensor_names import ANY_NUMBER, LAYER, layer_count, tensor_role

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
FURTHER = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers")
PER_LAYER = """
    layer_types mlp_layer_types layers_block_type block_types attention_layers attn_layers no_rope_layers indexer_types
    layer_rope_theta num_attention_heads_per_layer num_key_value_heads_per_layer intermediate_size
    activation_sparsity_pattern
""".split()
INDICES = ("moe_layers", "cross_attention_layers", "full_attn_idxs", "hybrid_layer_ids", "rope_scaling_layers")
BY_POSITION = """
    num_kv_shared_layers kv_source_layers scale_attn_by_inverse_layer_idx lambda_std_dev cross_attention_frequency
    n_layers_per_attn_res_block value_embedding_layers ple_layer_ids
""".split()

Row = Mapping[str, int]
"""One output layer: model -> its layer that goes there."""


@dataclass(frozen=True)
class Stack:
    """The layers of a model that slices speak of.

    depth: how many.  key: of the part of its config.json that describes them; None if that is the whole file.
    settings: that part with transformers' defaults.
    """

    depth: int
    key: str | None
    settings: Mapping[str, Any]


def find_stack(name: str, model: Checkpoint) -> Stack:
    """The decoder of a model.  EvomergeError if it has several stacks of layers that slices could mean."""
    stored, known = layer_count(list(model.tensors)), known_config(model.config)
    prefixes = {prefix(tensor) for tensor in model.tensors if tensor_role(tensor).layer is not None}
    if getattr(known, "is_encoder_decoder", model.config.get("is_encoder_decoder")):
        prefixes = {"an encoder", "a decoder"}
    if len(prefixes) > 1:
        raise EvomergeError(
            f"slices: {name} has several stacks of layers ({', '.join(sorted(prefixes))}), and slices cannot say which "
            "of them they mean; merge such models whole"
        )
    if known is None:  # an architecture that transformers does not know
        counts = [model.config[key] for key in COUNTS if isinstance(model.config.get(key), int)]
        return Stack(min([stored, *counts]), None, model.config)
    text = known.get_text_config(decoder=True)
    keys = [key for key in known.sub_configs if getattr(known, key, None) is text]
    if text is not known and not keys:
        raise EvomergeError(f"slices: the configuration of {name} does not say where its language model is described")
    # Layers beyond the count predict further tokens (DeepSeek's MTP): they follow the head, outside the stack.
    return Stack(min(stored, text.num_hidden_layers), keys[0] if keys else None, text.to_dict())


def prefix(tensor: str) -> str:
    """What stands before the layer's number in the name of a tensor of a layer."""
    found = LAYER.search(tensor) or ANY_NUMBER.search(tensor)
    return tensor if found is None else tensor[: found.start(1)]


def assembled_config(
    config: Mapping[str, Any], rows: Sequence[Row], stacks: Mapping[str, Stack], origins: Mapping[str, Any]
) -> dict[str, Any]:
    """The base's configuration for other layers.

    stacks: of the base (`base`) and every model of the rows.  origins: the output's tensors.

    EvomergeError if the models of one layer differ in its kind (sliding and full attention), or no configuration says
    what the layers are.
    """
    out = deepcopy(dict(config))
    base = stacks["base"]
    inner = out.get(base.key or "")
    holders = [inner, out] if isinstance(inner, dict) else [out]

    def put(key: str, value: Any, only_where_it_is: bool = False) -> None:
        for number, holder in enumerate(holders):
            if key in holder or (number == 0 and not only_where_it_is):
                holder[key] = value

    counts = [key for key in COUNTS if any(key in holder for holder in holders)]
    for key in counts or [canonical_count(config, base)]:
        put(key, len(rows))
    lists = per_layer_lists(rows, stacks)
    for key, value in lists.items():
        put(key, value)
    sparse = {tensor_role(name).layer for name in origins if ".experts." in name}
    leading = next((layer for layer in range(len(rows)) if layer in sparse), len(rows))
    for key in DENSE_FIRST:
        if base.settings.get(key) is not None:
            put(key, leading)
    for key in FURTHER:
        put(key, 0, only_where_it_is=True)
    first = holders[0]
    if first.get("max_window_layers") is not None:  # the first layer with a sliding window
        types = lists.get("layer_types", [])
        put("max_window_layers", types.index("sliding_attention") if "sliding_attention" in types else len(rows))
    if "mlp_only_layers" in first or "decoder_sparse_step" in first:
        put("decoder_sparse_step", 1)
        put("mlp_only_layers", [i for i in range(len(rows)) if i not in sparse])
    check_assembled(out, len(rows), lists)
    return out


def canonical_count(config: Mapping[str, Any], stack: Stack) -> str:
    """What an architecture calls its number of layers."""
    known = known_config(config)
    text = known if known is None or stack.key is None else getattr(known, stack.key)
    return str(getattr(text, "attribute_map", {}).get(COUNTS[0], COUNTS[0]))


def per_layer_lists(rows: Sequence[Row], stacks: Mapping[str, Stack]) -> dict[str, list[Any]]:
    """What the configurations say of single layers, for the output's layers.

    EvomergeError if the models of one layer differ in it, or it depends on where the layer stands.
    """
    used = {name for row in rows for name in row}
    for key in BY_POSITION:
        if users := sorted(name for name in used if stacks[name].settings.get(key)):
            raise EvomergeError(f"slices: {users[0]} has layers whose place decides what they compute ({key})")

    def is_list(key: str, name: str) -> bool:
        value = stacks[name].settings.get(key)
        return isinstance(value, list | tuple) and (key in INDICES or len(value) >= stacks[name].depth)

    found: dict[str, list[Any]] = {}
    for key in (*PER_LAYER, *INDICES):
        if not all(is_list(key, name) for name in used):
            continue
        kinds = []
        for layer, row in enumerate(rows):
            values = [(stacks[name].settings[key], at) for name, at in row.items()]
            kind, *others = [at in value if key in INDICES else value[at] for value, at in values]
            if any(other != kind for other in others):
                raise EvomergeError(
                    f"layer {layer} of the slices: {key} differs: {', '.join(map(str, [kind, *others]))}"
                )
            kinds.append(kind)
        found[key] = [layer for layer, is_in in enumerate(kinds) if is_in] if key in INDICES else kinds
    return found


def check_assembled(config: Mapping[str, Any], depth: int, lists: Mapping[str, list[Any]]) -> None:
    """EvomergeError if transformers reads anything else in a configuration than what was put there."""
    known = known_config(config)
    if known is None:
        return
    text = known.get_text_config(decoder=True)
    settings = text.to_dict()
    if text.num_hidden_layers != depth:
        raise EvomergeError(
            f"slices: no configuration of {config.get('model_type')} has {depth} layers; transformers would build "
            f"{text.num_hidden_layers}"
        )
    for key, value in lists.items():
        if key in settings and list(settings[key]) != value:
            raise EvomergeError(f"slices: no configuration of {config.get('model_type')} has the {key} {value}")
