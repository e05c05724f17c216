"""The live model: one model in memory whose weights every candidate overwrites in place."""

import re
from pathlib import Path
from typing import Any, Literal

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError, first_line
from evomerge.files import read_json
from evomerge.merge.bank.bank import Bank
from evomerge.merge.compute_dtype import faster_type, measure
from evomerge.merge.materialise import materialise
from evomerge.merge.recipe.recipe import Dtype, Model, Recipe, RecipeSource
from evomerge.sources.architecture import known_config
from evomerge.sources.checkpoint import open_weight_files, read_config
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import is_computed_buffer
from evomerge.sources.tokenizer import open_tokenizer, read_vocabulary

# transformers 5 keeps a mixture's experts in two stacked parameters; on disk each expert has its own three.
EXPERT = re.compile(r"^(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")


def load_live_model(path: Path, dtype: torch.dtype, device: torch.device, compute: torch.dtype | None = None) -> Any:
    """A model as transformers builds it from a folder, on the device, ready to be scored or overwritten.

    dtype: what its weights are rounded to.  compute: the type that holds them and computes, if another.
    EvomergeError if transformers cannot open it (unknown architecture, missing code).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration may be wrong in any way; code that lies beside the model is not run
        reason = first_line(error)
        if "custom code" in str(error):
            reason = "it needs Python code of its own, `auto_map` in config.json, which evomerge never runs"
        raise EvomergeError(f"{path}: transformers cannot open it ({reason})") from error
    return ready(model, dtype, device, compute)


def candidate_model(bank: Bank, dtype: torch.dtype, compute: torch.dtype | None = None) -> Any:
    """The live model that a bank's candidates overwrite: the base's, or one of the layout's own depth and width.

    dtype, compute: see `load_live_model`.
    """
    base = bank.models.base.path
    if bank.layout.config == read_json(base / "config.json"):
        return load_live_model(base, dtype, bank.device, compute)
    from transformers import AutoModelForCausalLM, GenerationConfig

    if (known := known_config(bank.layout.config)) is None:
        raise EvomergeError(f"{base}: transformers does not know its architecture")
    try:
        model = AutoModelForCausalLM.from_config(known, dtype=dtype)
    except Exception as error:
        reason = first_line(error)
        raise EvomergeError(f"{base}: transformers cannot build it ({reason})") from error
    if (folder := bank.models.tokenizer_folder).joinpath("generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return ready(model, dtype, bank.device, compute)


def ready(model: Any, dtype: torch.dtype, device: torch.device, compute: torch.dtype | None) -> Any:
    """A model on its device that nobody trains.  It is widened, never narrowed: what transformers keeps in float32 (the
    frequencies of rotary positions) stays so."""
    model = model.requires_grad_(False).eval().to(device)
    return model if compute in (None, dtype) else model.to(compute)


def destinations(model: Any, bank: Bank) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the live parameter (or its part) that holds this tensor.  Tied weights appear once.

    EvomergeError if a parameter of the model would be left as it was.
    """
    parameters = {name: p.data for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    prefix = getattr(model, "base_model_prefix", "") + "."
    found: dict[str, torch.Tensor] = {}
    for name in bank.names:
        tensor = live_tensor(name, parameters, prefix)
        if tensor is not None:
            found[name] = tensor
        elif not (
            name in buffers or prefix + name in buffers or bank.merged_as(name) != name or is_computed_buffer(name)
        ):
            raise EvomergeError(
                f"{bank.models.base.path}: transformers' {type(model).__name__} has no parameter for the tensor {name}"
            )
    covered = sum(t.numel() for t in found.values())
    total = sum(p.numel() for p in parameters.values())
    if covered != total:
        raise EvomergeError(
            f"{bank.models.base.path}: its files hold {covered:,} of the {total:,} weights of "
            f"transformers' {type(model).__name__}; the checkpoint is incomplete"
        )
    return found


def live_tensor(name: str, parameters: dict[str, torch.Tensor], prefix: str) -> torch.Tensor | None:
    """The part of the live model that a checkpoint tensor becomes, None if there is none.

    Older checkpoints miss the model's prefix (`h.0.` for `transformer.h.0.`) or still have it on the head.
    """
    for candidate in (name, prefix + name, name.replace("embed_out.", "lm_head.")):
        if candidate in parameters:
            return parameters[candidate]
    moved = name.replace(".block_sparse_moe.", ".mlp.")
    if moved in parameters:
        return parameters[moved]
    if match := EXPERT.match(moved):
        block, index, part = match["block"], int(match["index"]), match["part"]
        if part in ("w2", "down_proj"):
            stacked = parameters.get(f"{block}.experts.down_proj")  # (experts, hidden, inner)
            return None if stacked is None else stacked[index]
        stacked = parameters.get(f"{block}.experts.gate_up_proj")  # (experts, 2 inner, hidden)
        if stacked is not None:
            inner = stacked.shape[1] // 2
            return stacked[index, :inner] if part in ("w1", "gate_proj") else stacked[index, inner:]
    return None


def open_live_model(
    folder: Path, base: Path | None, dtype: Dtype, device: torch.device, wanted: Dtype | Literal["auto"] = "auto"
) -> tuple[Any, Any]:
    """A model to score and its tokenizer.  An adapter is merged onto `base` by the ordinary road.

    dtype: what its weights are rounded to.  wanted: the type to compute in; `auto` measures (`compute.py`).

    EvomergeError if the folder is an adapter and no base is given.
    """
    is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    whole = folder if not is_adapter else base
    if whole is None:
        raise EvomergeError(f"{folder}: is an adapter; name its base model with --base")
    config, (_, tensors) = read_config(whole), open_weight_files(whole)  # say what is wrong before transformers tries
    if wanted == "auto" and "quantization_config" in config:
        wanted = dtype  # its products are its own
    elif wanted == "auto":
        shapes = (tuple(part.get_shape()) for _, part in tensors.values())
        wanted = faster_type(dtype, measure(dtype, device.type, shapes))
    types = TORCH_DTYPES[dtype], TORCH_DTYPES[wanted]
    if not is_adapter:
        return load_live_model(folder, types[0], device, types[1]), open_tokenizer(folder)
    vocabulary = "source" if read_vocabulary(folder) else None  # an adapter may have added tokens
    bank = Bank(open_models(whole, {"source": folder}, vocabulary=vocabulary), device)
    model = candidate_model(bank, *types)
    source = RecipeSource(name="source", path=str(folder))
    base_model = Model(path=str(whole))
    recipe = Recipe(method="linear", dtype=dtype, base=base_model, sources=[source], vocabulary=vocabulary)
    materialise(recipe, bank, destinations(model, bank))
    return model, open_tokenizer(bank.models.tokenizer_folder)
