"""The configuration of a model that a recipe with slices makes: the number of layers, and the keys for single layers.

A configuration describes single layers by lists (`layer_types`), by lists of layer numbers (`moe_layers`) and by counts
of the first layers (`first_k_dense_replace`).  All of them follow the layers to their new numbers.  If the position of
a layer alone decides what it computes, the merge is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.sources.architecture import known_config
from evomerge.sources.checkpoint import Checkpoint
from evomerge.sources.tensor_names import ANY_NUMBER, LAYER, layer_count, tensor_role

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")
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

OutputLayer = Mapping[str, int]
"""One layer of the output: model -> the number of its layer that goes there."""


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model that slices may use.

    depth: the number of layers.
    key: of the part of config.json that describes them (`text_config`); None if the whole file does.
    settings: that part with transformers' defaults.
    """

    depth: int
    key: str | None
    settings: Mapping[str, Any]


def find_layer_stack(name: str, model: Checkpoint) -> LayerStack:
    """The decoder's layers of a model.  EvomergeError if slices could mean several stacks of layers."""
    stored, known = layer_count(list(model.tensors)), known_config(model.config)
    prefixes = {name_before_layer(tensor) for tensor in model.tensors if tensor_role(tensor).layer is not None}
    if getattr(known, "is_encoder_decoder", model.config.get("is_encoder_decoder")):
        prefixes = {"an encoder", "a decoder"}
    if len(prefixes) > 1:
        raise EvomergeError(
            f"slices: {name} has several stacks of layers ({', '.join(sorted(prefixes))}), and slices cannot say which "
            "of them they mean; merge such models whole"
        )
    if known is None:  # an architecture that transformers does not know
        counts = [model.config[key] for key in COUNTS if isinstance(model.config.get(key), int)]
        return LayerStack(min([stored, *counts]), None, model.config)
    text = known.get_text_config(decoder=True)
    keys = [key for key in known.sub_configs if getattr(known, key, None) is text]
    if text is not known and not keys:
        raise EvomergeError(f"slices: the configuration of {name} does not say where its language model is described")
    # Layers beyond the count predict further tokens (DeepSeek's MTP): they follow the head and are no decoder layers.
    return LayerStack(min(stored, text.num_hidden_layers), keys[0] if keys else None, text.to_dict())


def name_before_layer(tensor: str) -> str:
    """The name of a tensor of a layer up to the layer's number."""
    found = LAYER.search(tensor) or ANY_NUMBER.search(tensor)
    return tensor if found is None else tensor[: found.start(1)]


def sliced_config(
    config: Mapping[str, Any],
    output_layers: Sequence[OutputLayer],
    stacks: Mapping[str, LayerStack],
    tensors: Iterable[str],
) -> dict[str, Any]:
    """The base's configuration, changed to describe the layers of the output.

    config: of the base.
    stacks: of the base (`base`) and of every model that has a layer in the output.
    tensors: the names of the output's tensors.

    EvomergeError if the models of one layer have other kinds of layer there (sliding and full attention), or no
    configuration can describe the layers.
    """
    out = deepcopy(dict(config))
    base = stacks["base"]
    inner = out.get(base.key or "")
    holders = [inner, out] if isinstance(inner, dict) else [out]

    def put(key: str, value: Any, only_if_given: bool = False) -> None:
        for number, holder in enumerate(holders):
            if key in holder or (number == 0 and not only_if_given):
                holder[key] = value

    depth = len(output_layers)
    counts = [key for key in COUNTS if any(key in holder for holder in holders)]
    for key in counts or [layer_count_key(config, base)]:
        put(key, depth)
    lists = per_layer_lists(output_layers, stacks)
    for key, value in lists.items():
        put(key, value)
    sparse = {tensor_role(name).layer for name in tensors if ".experts." in name}
    leading = next((layer for layer in range(depth) if layer in sparse), depth)
    for key in DENSE_FIRST:
        if base.settings.get(key) is not None:
            put(key, leading)
    for key in FURTHER_LAYERS:
        put(key, 0, only_if_given=True)
    first = holders[0]
    if first.get("max_window_layers") is not None:  # the first layer with a sliding window
        types = lists.get("layer_types", [])
        put("max_window_layers", types.index("sliding_attention") if "sliding_attention" in types else depth)
    if "mlp_only_layers" in first or "decoder_sparse_step" in first:
        put("decoder_sparse_step", 1)
        put("mlp_only_layers", [i for i in range(depth) if i not in sparse])
    check_as_read(out, depth, lists)
    return out


def layer_count_key(config: Mapping[str, Any], stack: LayerStack) -> str:
    """The key under which an architecture has its number of layers."""
    known = known_config(config)
    text = known if known is None or stack.key is None else getattr(known, stack.key)
    return str(getattr(text, "attribute_map", {}).get(COUNTS[0], COUNTS[0]))


def per_layer_lists(output_layers: Sequence[OutputLayer], stacks: Mapping[str, LayerStack]) -> dict[str, list[Any]]:
    """The lists of the configuration that describe single layers, for the layers of the output.

    EvomergeError if the models of one layer differ there, or the position of a layer decides what it computes.
    """
    used = {name for members in output_layers for name in members}
    for key in BY_POSITION:
        if users := sorted(name for name in used if stacks[name].settings.get(key)):
            raise EvomergeError(f"slices: {users[0]} has layers whose position decides what they compute ({key})")

    def is_list(key: str, name: str) -> bool:
        value = stacks[name].settings.get(key)
        return isinstance(value, list | tuple) and (key in INDICES or len(value) >= stacks[name].depth)

    found: dict[str, list[Any]] = {}
    for key in (*PER_LAYER, *INDICES):
        if not all(is_list(key, name) for name in used):
            continue
        kinds = []
        for layer, members in enumerate(output_layers):
            values = [(stacks[name].settings[key], at) for name, at in members.items()]
            kind, *others = [at in value if key in INDICES else value[at] for value, at in values]
            if any(other != kind for other in others):
                raise EvomergeError(
                    f"layer {layer} of the slices: {key} differs: {', '.join(map(str, [kind, *others]))}"
                )
            kinds.append(kind)
        found[key] = [layer for layer, is_in in enumerate(kinds) if is_in] if key in INDICES else kinds
    return found


def check_as_read(config: Mapping[str, Any], depth: int, lists: Mapping[str, list[Any]]) -> None:
    """EvomergeError if transformers reads another number of layers, or other lists, from a configuration."""
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
