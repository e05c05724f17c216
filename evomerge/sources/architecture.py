"""What transformers knows of a model without its weights: its configuration with all defaults, its modules."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any


def known_config(config: Mapping[str, Any]) -> Any | None:
    """The configuration object of transformers for a config.json, with all defaults.

    config: the content of config.json.

    Returns None if transformers does not know the architecture.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:  # only from a file does transformers decode what JSON cannot express
        Path(folder, "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception:  # each architecture checks its own configuration and raises any type of error
            return None


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a causal language model; one that names no class is taken for one."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return "model_type" in config


def is_multimodal(config: Mapping[str, Any], name: str) -> bool:
    """Whether a class is transformers' for the language model and the towers of a configuration.

    name: of the class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as classes

    return bool(name) and classes.get(config.get("model_type")) == name


def named_architecture(config: Mapping[str, Any]) -> str:
    """How messages call the architecture of a configuration."""
    if not config:
        return "architecture (there is no config.json)"
    if "_class_name" in config:
        return f"architecture {config['_class_name']!r:.60} of diffusers"
    return f"architecture {config.get('model_type')!r}"


def empty_model(config: Mapping[str, Any]) -> Any | None:
    """The model of a config.json on torch's `meta` device: modules and shapes, no memory for weights.

    Returns None if transformers does not know the architecture, or lacks a package that it needs.
    """
    return cached_empty_model(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=4)
def cached_empty_model(config_text: str) -> Any | None:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = json.loads(config_text)
    known = known_config(config)
    for model_class in () if known is None else model_classes(config, known):
        try:
            with torch.device("meta"):
                return model_class(known)
        except Exception:
            continue
    return None


def model_classes(config: Mapping[str, Any], known: Any) -> Iterator[Any]:
    """The classes that may build a model, the most likely first.

    The class that config.json names under `architectures` comes first, then those for its model type.
    """
    import transformers

    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and getattr(named, "config_class", None) is type(known):
            yield named
    for task in ("CausalLM", "ImageTextToText", "Seq2SeqLM"):
        yield getattr(transformers, f"AutoModelFor{task}").from_config
    yield transformers.AutoModel.from_config


def name_of_head(model: Any | None) -> str:
    """The parameter name of the matrix from hidden states to logits.  model: of `empty_model`."""
    if model is None or (head := model.get_output_embeddings()) is None:
        return "lm_head.weight"
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)
