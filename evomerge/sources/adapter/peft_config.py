"""PEFT's configuration of an adapter: every key is honoured, has no effect on merged weights, or is refused.

The keys are those of `peft.LoraConfig` (a test compares them), and keys that other libraries add to it.
"""

from collections.abc import Mapping
from typing import Any

import regex

from evomerge.errors import EvomergeError

LARGEST_ALPHA = 1e6  # PEFT's default is 8
PATTERN_LENGTH = 1000
MATCHING_SECONDS = 0.2

# Keys that a merge obeys.  For `bias`, and the rank in `r` and `rank_pattern`, the tensors of the file decide.
HONOURED = frozenset(
    """
    peft_type lora_alpha alpha_pattern use_rslora r rank_pattern fan_in_fan_out bias lora_bias modules_to_save
    trainable_token_indices target_parameters ensure_weight_tying init_lora_weights base_model_name_or_path
    """.split()
)
# Keys that act only in training, or choose layers (those with tensors in the file are the chosen ones); details of an
# `init_lora_weights` and of QALoRA, which are refused themselves; keys of ms-swift and of PEFT's first versions.
WITHOUT_EFFECT = frozenset(
    """
    task_type auto_mapping peft_version revision inference_mode target_modules exclude_modules lora_dropout
    layers_to_transform layers_pattern runtime_config velora_config megatron_core
    loftq_config eva_config corda_config lora_ga_config qalora_group_size
    lora_dtype lorap_lr_ratio lorap_emb_lr merge_weights
    """.split()
)
# Keys with which an adapter is not a sum with the base -> why not, or what to do about it.
MERGE_FIRST = "merge it into a checkpoint with PEFT first"
REFUSED = {
    "use_dora": f"a DoRA is not a low-rank sum; {MERGE_FIRST}",
    "kasa_config": f"KaSA changes the base model's weights too; {MERGE_FIRST}",
    "monteclora_config": f"its weights are sampled; {MERGE_FIRST}",
    "use_bdlora": f"its matrices are block-diagonal; {MERGE_FIRST}",
    "use_qalora": "its base is quantised in groups of inputs; PEFT cannot merge it either",
    "alora_invocation_tokens": "it acts only after its invocation tokens, which no merged weights can; "
    "train a plain LoRA",
    "arrow_config": "it routes between several adapters; merge those one by one",
    "layer_replication": "the adapter's layers are not the base model's; save the base with its repeated layers first",
    "megatron_config": "its layers are Megatron's parallel layers; convert them to PEFT's plain layers first",
    "enable_lora": "it adapts parts of a layer in an old form of PEFT's; save it with a newer PEFT first",
}
PLAIN_INIT = ("gaussian", "eva", "orthogonal", "mica", "true", "false", "none")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT subtracts their first B A from the base
SWITCHES = ("use_rslora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying")
BIASES = ("none", "all", "lora_only")


def config_problem(config: Mapping[str, Any]) -> str | None:
    """Why an adapter with this configuration cannot be merged; None if it can."""
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        return f"peft_type is {config['peft_type']!s:.60}; only LORA can be merged"
    for key, value in config.items():
        if is_unset(value):
            continue
        if key in REFUSED:
            return f"{key} is set; {REFUSED[key]}"
        if key not in HONOURED and key not in WITHOUT_EFFECT:
            return (
                f"{key:.60} is set to {value!r:.60}, a setting of a newer PEFT that may change what the weights mean; "
                "take the key out if it acts only in training"
            )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGES_BASE):
        return (
            f"init_lora_weights is {config['init_lora_weights']!r:.60}, which changes the base model too; "
            "convert it to a plain LoRA with PEFT first"
        )
    if init not in PLAIN_INIT:
        return f"init_lora_weights is {config['init_lora_weights']!r:.60}, which may change the base model too"
    return kind_problem(config) or alpha_problem(config) or token_problem(config.get("trainable_token_indices"))


def is_unset(value: Any) -> bool:
    """Whether a value says that a setting is not used."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def kind_problem(config: Mapping[str, Any]) -> str | None:
    """A key whose value is of the wrong type or none of the allowed values, as text; None if there is none."""
    for key in SWITCHES:
        if not isinstance(config.get(key), (bool, type(None))):
            return f"{key} must be true or false, found {config[key]!r:.60}"
    if config.get("bias", "none") not in BIASES:
        return f"bias must be one of {', '.join(BIASES)}, found {config['bias']!r:.60}"
    for key in ("modules_to_save", "target_parameters"):
        value = config.get(key)
        if not is_unset(value) and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return f"{key} must be a list of names, found {value!r:.60}"
    return None


def alpha_problem(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the numbers that scale the product B A; None if nothing is."""
    if not is_alpha(config.get("lora_alpha", 8)):
        return f"lora_alpha must be a finite number, found {config['lora_alpha']!r:.60}"
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        return f"alpha_pattern must be a mapping of modules to numbers, found {patterns!r:.60}"
    for module, alpha in patterns.items():
        if not is_alpha(alpha):
            return f"alpha_pattern.{module:.60}: must be a finite number, found {alpha!r:.60}"
        if problem := pattern_problem(module):
            return f"alpha_pattern.{module:.60}: {problem}"
    return None


def token_problem(value: Any) -> str | None:
    """What is wrong with `trainable_token_indices`, a list of tokens or one for each embedding; None if nothing is."""
    for tokens in value.values() if isinstance(value, dict) else [value or []]:
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 24 for token in tokens):
            return f"trainable_token_indices must be lists of token ids, found {value!r:.60}"
    return None


def is_alpha(value: Any) -> bool:
    """Whether a value is a finite number below `LARGEST_ALPHA`."""
    return type(value) in (int, float) and abs(value) < LARGEST_ALPHA


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a key of `alpha_pattern`, a regular expression; None if it can be used."""
    if len(pattern) > PATTERN_LENGTH:
        return f"a pattern of {len(pattern):,} characters"
    try:
        regex.compile(rf"(.*\.)?({pattern})$")
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        return f"not a regular expression ({error})"
    return None


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of the product B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora` (rank-stabilised LoRA).

    `alpha_pattern` may give a module an alpha of its own.
    """
    alpha = float(pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as in PEFT; `default` if none does.

    EvomergeError if a pattern takes longer than `MATCHING_SECONDS`: some expressions take years on short names.
    """
    for key, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({key})$", module, timeout=MATCHING_SECONDS):
                return value
        except TimeoutError as error:
            raise EvomergeError(
                f"alpha_pattern: {key[:60]!r} takes too long to match {module!r}; write the module's name instead"
            ) from error
    return default


def is_saved_module(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is one of `modules_to_save`: trained as a whole, and no longer tied to another."""
    return module.endswith(tuple(config.get("modules_to_save") or ()))


def trained_tokens(config: Mapping[str, Any], module: str) -> list[int]:
    """The trained tokens of an embedding or a head, in the order of their rows in the file."""
    value = config.get("trainable_token_indices") or []
    if isinstance(value, list):
        return value
    return next((tokens for name, tokens in value.items() if module.endswith(name)), [])
