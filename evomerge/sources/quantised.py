"""Quantised checkpoints are refused: packed integers, 8-bit floats and their scales cannot be averaged.

A checkpoint is quantised if its configuration says so (`quantization_config`; `quantization` in MLX,
`compression_config` in old compressed-tensors), or if its tensors have the names or the types of packed weights.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.sources.tensor_names import is_computed_buffer

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
DEPTH = 8  # of configurations inside configurations
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")

# Tensors that each kind of quantisation stores beside or instead of a weight.  The first kind that matches counts.
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
    configured = next(quantisation_settings(config), None)
    packed = packed_tensor(tensors)
    if configured is None and packed is None:
        return None
    if configured is not None and packed is None:
        key, method = configured
        return (
            f"{folder}: config.json has `{key}` ({method}), but no tensor is packed. If the weights are plain, remove "
            f"`{key}` from config.json: with it, transformers would quantise the merged model when it is loaded"
        )
    kind, tensor = packed or ("", "")
    method = configured[1] if configured else kind
    return (
        f"{folder}: is quantised ({method}): tensor {tensor} has the type {tensors[tensor]}, which cannot be merged, "
        f"nor can the scales of packed weights. {remedy(folder, method)}"
    )


def quantisation_settings(config: Mapping[str, Any], depth: int = DEPTH) -> Iterator[tuple[str, str]]:
    """The keys of a configuration that say it is quantised, each with the method.

    Nested configurations (`text_config`) are searched too, `depth` levels deep.
    """
    for key, value in config.items():
        if not isinstance(value, dict) or not value:
            continue
        if key in CONFIG_KEYS:
            yield key, quantisation_method(value)
        elif depth:
            yield from quantisation_settings(value, depth - 1)


def quantisation_method(settings: Mapping[str, Any]) -> str:
    """The method that a `quantization_config` names, with its bits if it gives them."""
    method = settings.get("quant_method") or settings.get("quant_library") or settings.get("mode") or "unnamed method"
    if method == "bitsandbytes" or "load_in_4bit" in settings or "load_in_8bit" in settings:
        return f"bitsandbytes, {4 if settings.get('load_in_4bit', settings.get('_load_in_4bit')) else 8} bit"
    bits = settings.get("bits", settings.get("w_bit"))
    return f"{method!s:.40}, {bits} bit" if type(bits) is int else f"{method!s:.40}"


def packed_tensor(tensors: Mapping[str, str]) -> tuple[str, str] | None:
    """The kind of quantisation and the name of a tensor that shows it; None if no tensor is packed.

    tensors: name -> type, as in `quantisation_problem`.

    Integers alone do not show it (position ids, masks and expert numbers are integers): an integer tensor is packed if
    its name ends in a weight's, or if its module has a scale or a zero point.
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
    """Whether packed weights may have this type."""
    return dtype in INTEGERS or dtype.startswith(("F8", "F4", "F6"))


def remedy(folder: Path, method: str) -> str:
    """What to do about a quantised checkpoint, with the line of Python that dequantises it if transformers can."""
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
