"""Differences between two model configurations that change what the weights compute, key by key.

A key that is left out has the default of transformers, and old spellings count as new ones (`rope_theta` and
`rope_scaling` as `rope_parameters`), so that two spellings of one meaning are no difference.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from evomerge.sources.architecture import known_config

Allowed = Literal["rope_theta", "rope_scaling"]
"""Differences that a recipe or a search may allow (`allow_differences`)."""
ALLOWED: tuple[Allowed, ...] = get_args(Allowed)

LAYER_COUNTS = ("num_hidden_layers", "n_layer")
# Keys of the architecture: models that differ here have other tensors, or compute another kind of function.
STRUCTURE = frozenset(
    """
    model_type architectures hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head
    num_key_value_heads head_dim intermediate_size n_inner hidden_act activation_function vocab_size
    num_experts num_local_experts num_experts_per_tok
    """.split()
)
# Keys that are not compared, because they do not change what the weights compute in a forward pass: names, types,
# training, generation.  `tie_word_embeddings` is compared together with the tensors.
IGNORED = frozenset(
    """
    _name_or_path transformers_version dtype torch_dtype use_cache use_bfloat16 auto_map attn_implementation
    _attn_implementation _attn_implementation_internal _commit_hash tokenizer_class finetuning_task
    task_specific_params problem_type id2label label2id num_labels return_dict return_dict_in_generate
    output_attentions output_hidden_states output_scores output_router_logits router_aux_loss_coef router_z_loss_coef
    router_jitter_noise aux_loss_alpha seq_aux initializer_range initializer_factor initializer_std init_std
    gradient_checkpointing use_gradient_checkpointing pretraining_tp torchscript chunk_size_feed_forward pruned_heads
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids do_sample temperature
    top_k top_p typical_p num_beams num_beam_groups early_stopping diversity_penalty length_penalty
    repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences min_length max_length
    max_new_tokens remove_invalid_values exponential_decay_length_penalty prefix model_max_length base_model
    base_model_name_or_path unsloth_version unsloth_fixed vocab_size
    tie_word_embeddings
    """.split()
)
IGNORED_ENDINGS = ("dropout", "_pdrop", "dropout_prob", "_dropout_rate", "layerdrop")
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
DEPTH = 8  # levels of configurations inside configurations
LENGTH_SCALED = ("dynamic", "longrope", "yarn")  # rope types that use `max_position_embeddings`


@dataclass(frozen=True)
class ConfigDifference:
    """A key in which two configurations differ.

    key: its path (`text_config.rope_parameters.rope_theta`).
    ours, theirs: the values in the base and in the source; None if not given.
    kind: `note` if the models can be merged, `structure` if they cannot, else the name under which
        `allow_differences` must allow the difference (`rope_theta`, `rope_scaling`).
    """

    key: str
    ours: Any
    theirs: Any
    kind: Literal["note", "structure"] | Allowed

    @property
    def last_key(self) -> str:
        return self.key.rpartition(".")[2]


def compare_configs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[ConfigDifference]:
    """The keys in which two configurations make the same weights compute something else.

    ours: of the base.  theirs: of a source.  Returns problems first, notes last.
    """
    if ours.get("model_type") != theirs.get("model_type"):  # the defaults differ too, so only what is written counts
        x, y = ({k: v for k, v in c.items() if k in STRUCTURE} for c in (ours, theirs))
    elif without_ignored(ours) == without_ignored(theirs):
        return []
    else:
        filled = with_defaults(ours), with_defaults(theirs)
        compared = (filled[0], filled[1]) if all(filled) else (ours, theirs)
        x, y = (flattened(with_rope_parameters(c)) for c in compared if c)
    found = []
    for key in dict.fromkeys([*x, *y]):
        a, b = x.get(key), y.get(key)
        last = key.rpartition(".")[2]
        if a == b or (last == "architectures" and None in (a, b)):
            continue
        if last == "vocab_size" or not is_ignored(last):
            found.append(ConfigDifference(key, a, b, difference_kind(key, x, y)))
    return sorted(found, key=lambda d: (d.kind == "note", d.last_key not in STRUCTURE))


def difference_kind(
    key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Literal["note", "structure"] | Allowed:
    """What a difference means for a merge (see `ConfigDifference`).

    key: its path.  ours, theirs: the flattened configurations.
    """
    *above, last = key.split(".")
    if last in STRUCTURE:
        return "structure"
    if last == "rope_theta" or "rotary_emb_base" in last:
        return "rope_theta"
    if "rope_parameters" in above or last in ("partial_rotary_factor", "rotary_pct"):
        return "rope_scaling"
    if last == "max_position_embeddings":
        prefix = ".".join([*above, "rope_parameters"])
        scaled = (v for c in (ours, theirs) for k, v in c.items() if k.startswith(prefix) and k.endswith("rope_type"))
        return "rope_scaling" if any(kind in LENGTH_SCALED for kind in scaled) else "note"
    return "note"


def is_ignored(key: str) -> bool:
    return key in IGNORED or key.endswith(IGNORED_ENDINGS)


def without_ignored(config: Mapping[str, Any], depth: int = DEPTH) -> dict[str, Any]:
    """A configuration without the ignored keys, also in nested configurations; `vocab_size` stays."""
    return {
        k: without_ignored(v, depth - 1) if isinstance(v, dict) and depth else v
        for k, v in config.items()
        if k == "vocab_size" or not is_ignored(k)
    }


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A configuration with transformers' defaults; None if transformers does not know the architecture."""
    known = known_config(config)
    return None if known is None else dict(known.to_dict())


def with_rope_parameters(config: Mapping[str, Any], depth: int = DEPTH) -> dict[str, Any]:
    """A configuration with everything about rotary positions under `rope_parameters`, as transformers 5 writes it."""
    out = {
        k: with_rope_parameters(v, depth - 1) if isinstance(v, dict) and depth and k not in ROPE_KEYS else v
        for k, v in config.items()
    }
    given = {k: out.pop(k) for k in ROPE_KEYS if k in out}
    rope: dict[str, Any] = {"rope_theta": given["rope_theta"]} if given.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(given.get(key), dict):
            rope |= given[key]
    if not rope:
        return out
    by_layer_type = {k: v for k, v in rope.items() if isinstance(v, dict)}
    out["rope_parameters"] = {k: with_rope_type(v) for k, v in by_layer_type.items()} or with_rope_type(rope)
    return out


def with_rope_type(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters with their type under `rope_type`, which older files call `type`."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return {k: v for k, v in rope.items() if k != "type"} | {"rope_type": "longrope" if kind == "su" else kind}


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as path -> value (`text_config.hidden_size`); None counts as not given."""
    return dict(paths_and_values(config, "", DEPTH))


def paths_and_values(config: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and depth and key not in ("id2label", "label2id"):
            yield from paths_and_values(value, f"{prefix}{key}.", depth - 1)
        elif value is not None:
            yield f"{prefix}{key}", value


def difference_line(difference: ConfigDifference, name: str, allowed: Collection[str]) -> str:
    """One line about a difference: both values, and what the output has.

    name: of the source.  allowed: the kinds that are allowed.
    """
    line = (
        f"{name}: {difference.key} is {short_text(difference.theirs, difference.ours)}, in the base model "
        f"{short_text(difference.ours, difference.theirs)}"
    )
    if difference.kind == "structure":
        return line
    if difference.kind == "note" or difference.kind in allowed:
        return f"{line}; the output has the base model's"
    return (
        f"{line}: queries and keys are rotated by other angles, so equal weights compute something else; to merge "
        f"these models nevertheless, write `allow_differences: [{difference.kind}]`"
    )


def short_text(value: Any, other: Any) -> str:
    """A value as short text; for a long list, its first element that differs from the `other` list."""
    if isinstance(value, list) and isinstance(other, list) and len(value) > 6:
        at = next(
            (i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other))
        )
        return (
            f"a list of {len(value)}, with {value[at]!r:.60} at {at}" if at < len(value) else f"a list of {len(value)}"
        )
    return f"{value!r:.80}" if value is not None else "not given"
