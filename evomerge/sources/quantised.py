"""Quantised checkpoints: packed integers, 8-bit floats and their scales mean nothing to a merge, so they are refused.

A checkpoint is quantised if its configuration says so (`quantization_config`; `quantization` of MLX,
`compression_config` of old compressed-tensors), or if its tensors have the names or the types of packed weights.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.sources.tensor_names import is_computed_buffer

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
DEPTH = 8  # of configurations inside configurations
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")

# The tensors that each kind stores beside or instead of a weight; the first kind that has one names the checkpoint.
PACKED_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("bitsandbytes, 4 bit", re.compile(r"\.(?:nested_)?(?:absmax|quant_map)$|\.quant_state\.")),
    ("bitsandbytes, 8 bit", re.compile(r"\.(?:SCB|weight_format)$")),
    ("GPTQ", re.compile(r"\.g_idx$")),
    ("AWQ or GPTQ", re.compile(r"\.(?:qweight|qzeros|B_24)$")),
    ("compressed-tensors", re.compile(r"\.weight_(?:packed|shape|zero_point|g_idx)$|_global_scale$")),
    ("weights with scales, as in FP8", re.compile(r"\.(?:weight_scale(?:_inv|_2)?|input_scale|activation_scale)$")),
    ("MXFP4", re.compile(r"_proj_(?:blocks|scales)$")),
    ("HQQ", re.compile(r"\.W_q$")),
    ("quanto", re.compile(r"\.(?:weight\._data|weight\._scale|weight_qtype)$")),
    ("AQLM or VPTQ", re.compile(r"\.(?:codes|codebooks|centroids\.weight|indices)$")),
    ("EETQ", re.compile(r"\.weight_scales$")),
)  # fmt: skip
SCALE = re.compile(r"(?:^|[._])(?:q?scales?(?:_inv)?|q?zeros?|zero_points?|lut|meta)$")

BY_LOADING = {  # quant_method -> the class of transformers that dequantises while it loads
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
AFTER_LOADING = ("bitsandbytes", "higgs")  # where `model.dequantize()` is implemented


def quantisation_problem(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, str]) -> str | None:
    """Why a checkpoint cannot be merged because it is quantised; None if it is not.

    tensors: name -> type as the file's header writes it (`BF16`, `F8_E4M3`, `I8`).
    """
    said = next(said_by(config), None)
    packed = packed_tensor(tensors)
    if said is None and packed is None:
        return None
    if said is not None and packed is None:
        key, method = said
        return (
            f"{folder}: config.json has `{key}` ({method}), but no tensor is packed. If the weights are plain, remove "
            f"`{key}` from config.json: with it, transformers would quantise the merged model when it is loaded"
        )
    kind, tensor = packed or ("", "")
    method = said[1] if said else kind
    return (
        f"{folder}: is quantised ({method}): tensor {tensor} has the type {tensors[tensor]}, which cannot be merged, "
        f"nor can the scales of packed weights. {remedy(folder, method)}"
    )


def said_by(config: Mapping[str, Any], depth: int = DEPTH) -> Iterator[tuple[str, str]]:
    """The keys of a configuration, nested ones (`text_config`) included, that say it is quantised, and by what."""
    for key, value in config.items():
        if not isinstance(value, dict) or not value:
            continue
        if key in CONFIG_KEYS:
            yield key, method_of(value)
        elif depth:
            yield from said_by(value, depth - 1)


def method_of(settings: Mapping[str, Any]) -> str:
    """The method that a `quantization_config` names, with its bits where it says them."""
    method = settings.get("quant_method") or settings.get("quant_library") or settings.get("mode") or "unnamed method"
    if method == "bitsandbytes" or "load_in_4bit" in settings or "load_in_8bit" in settings:
        return f"bitsandbytes, {4 if settings.get('load_in_4bit', settings.get('_load_in_4bit')) else 8} bit"
    bits = settings.get("bits", settings.get("w_bit"))
    return f"{method!s:.40}, {bits} bit" if type(bits) is int else f"{method!s:.40}"


def packed_tensor(tensors: Mapping[str, str]) -> tuple[str, str] | None:
    """A kind of quantisation and a tensor that shows it; None if all tensors are plain.

    Named tables of integers (positions, masks, ids of experts) are plain: an integer tensor is packed if it is called
    a weight, or has a scale or a zero point beside it.
    """
    for kind, pattern in PACKED_NAMES:
        shown = [name for name in tensors if pattern.search(name)]
        if shown:
            modules = {pattern.sub("", name) for name in shown}
            inside = (n for n in tensors if is_packed_type(tensors[n]) and any(n.startswith(m) for m in modules))
            return kind, next(inside, shown[0])
    scaled = {name.rpartition(".")[0] for name in tensors if SCALE.search(name)}
    for name, dtype in tensors.items():
        if dtype.startswith(("F8", "F4", "F6")):
            return dtype, name
        module, _, last = name.rpartition(".")
        if dtype in INTEGERS and not is_computed_buffer(name) and (last.startswith("weight") or module in scaled):
            return "packed integers", name
    return None


def is_packed_type(dtype: str) -> bool:
    return dtype in INTEGERS or dtype.startswith(("F8", "F4", "F6"))


def remedy(folder: Path, method: str) -> str:
    """What to do about a quantised checkpoint: the lines of Python that dequantise it, where transformers can."""
    name = method.split(",")[0].lower()
    load = "AutoModelForCausalLM.from_pretrained"
    if name in BY_LOADING:
        how = f"{load}({str(folder)!r}, quantization_config={BY_LOADING[name]}(dequantize=True))"
    elif name in AFTER_LOADING:
        how = f"{load}({str(folder)!r}).dequantize()"
    else:
        return "Merge the unquantised model that it was made from"
    # With `save_original_format`, the default, transformers would quantise the weights again.
    return (
        "Merge the unquantised model that it was made from, or dequantise it with transformers: "
        f"{how}.save_pretrained(FOLDER, save_original_format=False)"
    )
