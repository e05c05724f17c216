"""What transformers says of an architecture: its whole configuration, and whether it finds every tensor of a folder.

The check is transformers' own loading, of tensors that have a type and a shape but no content (torch's `meta` device): its
renaming and fusing, tied weights and ignored buffers are all in it, and 8 billion weights take a tenth of a second.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.errors import EvomergeError
from evomerge.sources.anatomy import is_old_buffer

Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> type and shape."""


@dataclass(frozen=True)
class Loading:
    """How transformers would load a folder.

    missing: parameters that the folder lacks, which the loader would fill with random numbers.  unread: tensors that
    no parameter takes.  misshapen: parameter -> the shape in the folder, the shape of the architecture.
    """

    missing: frozenset[str]
    unread: frozenset[str]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def whole_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object, with all its defaults; None if it does not know the architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**deepcopy(dict(config)))
    except (ValueError, TypeError, KeyError):
        return None


def text_config(whole: Any) -> tuple[str | None, Any]:
    """The part of a whole configuration that describes the language model, and the key it stands under.

    The key is None where that is the whole configuration itself.
    """
    text = whole.get_text_config(decoder=True)
    keys = [key for key in getattr(whole, "sub_configs", None) or () if getattr(whole, key, None) is text]
    return (keys[0], text) if keys else (None, whole)


def loading(config: Mapping[str, Any], tensors: Tensors) -> Loading | None:
    """How transformers would load a folder with this config.json and these tensors.

    None if it does not know the architecture (or only by code that lies beside the model, which is never run).
    EvomergeError if it cannot load them at all.
    """
    with quiet():
        if (whole := whole_config(config)) is None or (model_class := class_of(config, whole)) is None:
            return None
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in tensors.items()}
        try:
            _, found = model_class.from_pretrained(
                None,
                config=whole,
                state_dict=empty,
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except ImportError:  # a package that this architecture alone needs
            return None
        except Exception as error:  # whatever a configuration makes a constructor do
            raise EvomergeError(f"transformers cannot load such a model ({first_line(error)})") from error
    return Loading(
        missing=frozenset(found["missing_keys"]),
        unread=frozenset(name for name in found["unexpected_keys"] if not is_old_buffer(name)),
        misshapen={name: (tuple(here), tuple(there)) for name, here, there in found["mismatched_keys"]},
    )


def class_of(config: Mapping[str, Any], whole: Any) -> Any:
    """The model class that a config.json names, or that its model type has; None if transformers has neither."""
    import transformers

    for name in config.get("architectures") or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and getattr(named, "config_class", None) is type(whole):
            return named
    autos = ("CausalLM", "ImageTextToText", "Seq2SeqLM", "TextToWaveform", "")
    for auto in (getattr(transformers, f"AutoModel{kind and 'For' + kind}") for kind in autos):
        with torch.device("meta"):
            try:
                return type(auto.from_config(deepcopy(whole)))
            except Exception:  # noqa: S112 (not of this kind; what is wrong with it is said by the loading)
                continue
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its warnings and bars, which speak of a model that nobody loads."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
