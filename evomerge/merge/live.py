"""The live model: one model in memory whose weights every candidate overwrites in place."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError, first_line, some
from evomerge.files.read import read_json
from evomerge.merge.bank.bank import Bank
from evomerge.merge.compute_dtype import faster_type, measure
from evomerge.merge.materialise import materialise
from evomerge.merge.recipe.recipe import Dtype, Model, Recipe, RecipeSource
from evomerge.sources.architecture import is_language_model, is_multimodal, known_config, named_architecture
from evomerge.sources.checkpoint import open_weight_files, read_config
from evomerge.sources.locate import before_download, fetch, locate
from evomerge.sources.open_models import Models, open_models
from evomerge.sources.tensor_names import is_computed_buffer
from evomerge.sources.tokenizer import Vocabulary, open_tokenizer, optional_tokenizer, read_vocabulary

# transformers 5 keeps the experts of a mixture in two stacked parameters; in a checkpoint each has three tensors.
EXPERT = re.compile(r"^(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")


def load_live_model(
    path: Path, dtype: torch.dtype, device: torch.device, compute: torch.dtype | None = None, language: bool = True
) -> Any:
    """Load a model from a folder with transformers, on the device, ready to be scored or overwritten.

    dtype: the type to which its weights are rounded.
    compute: the type that holds them and computes, if it is another.
    language: load a causal language model, else the class that the model's config.json names.

    EvomergeError if transformers cannot open it (unknown architecture, missing code), or a tensor is missing.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = read_config(path)
    with opening_errors(path, config, language):
        kind = live_class(config, language)
        model, found = kind.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise EvomergeError(
            f"{path}: lacks {len(missing)} tensor(s) of transformers' {type(model).__name__}, which would fill them "
            f"with random numbers: {some(missing)}"
        )
    return ready(model, dtype, device, compute)


@contextmanager
def opening_errors(path: Path, config: Mapping[str, Any], language: bool) -> Iterator[None]:
    """Within the context, whatever transformers raises becomes an EvomergeError that says why it cannot open a model.

    path: of the model.  config, language: see `live_class`.
    """
    try:
        yield
    except Exception as error:  # a configuration may be wrong in any way; code in the model's folder is not run
        reason = first_line(error)
        if language and config and not is_language_model(config):
            reason = f"{named_architecture(config)} is no causal language model; such models are scored by Python tasks"
        if "custom code" in str(error):
            reason = "it needs Python code of its own, `auto_map` in config.json, which evomerge never runs"
        raise EvomergeError(f"{path}: transformers cannot open it ({reason})") from error


def live_class(config: Mapping[str, Any], language: bool) -> Any:
    """transformers' class for a live model.

    A causal language model has the class of its kind.  A language model with towers has the one that its config.json
    names, because it keeps the towers; any other model too.

    config: the content of config.json.  language: whether the model has to write text.
    """
    import transformers

    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if language and not is_multimodal(config, name):
        return transformers.AutoModelForCausalLM
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and hasattr(found, "from_pretrained") else transformers.AutoModel


def candidate_model(bank: Bank, dtype: torch.dtype, compute: torch.dtype | None = None, language: bool = True) -> Any:
    """The live model for a bank's candidates: the base, or a model with the layout's own depth and width.

    dtype, compute, language: see `load_live_model`.

    EvomergeError if transformers cannot build it.
    """
    base = bank.models.base.path
    if bank.layout.config == read_json(base / "config.json"):
        return load_live_model(base, dtype, bank.live_device, compute, language)
    from transformers import GenerationConfig

    if (known := known_config(bank.layout.config)) is None:
        raise EvomergeError(f"{base}: transformers does not know its architecture")
    try:
        model = built(live_class(bank.layout.config, language), known, dtype)
    except Exception as error:
        reason = first_line(error)
        raise EvomergeError(f"{base}: transformers cannot build it ({reason})") from error
    if (folder := bank.models.tokenizer_folder).joinpath("generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return ready(model, dtype, bank.live_device, compute)


def built(kind: Any, known: Any, dtype: torch.dtype) -> Any:
    """A model with random weights.  kind: its class, of `live_class`.  known: its configuration, of transformers."""
    return (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(known, dtype=dtype)


def ready(model: Any, dtype: torch.dtype, device: torch.device, compute: torch.dtype | None) -> Any:
    """Prepare a model for inference on its device.

    It is widened, never narrowed: what transformers keeps in float32 (the frequencies of rotary positions) stays so.
    """
    model = model.requires_grad_(False).eval().to(device)
    return model if compute in (None, dtype) else model.to(compute)


def destinations(model: Any, bank: Bank) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the live parameter, or the part of one, that holds this tensor.  Tied weights appear once.

    EvomergeError if a candidate would not overwrite all parameters of the model.
    """
    parameters = {name: p.data for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    saved = model.state_dict()
    stored = {n: b for n, b in buffers.items() if n in saved and b.is_floating_point()}
    prefix = getattr(model, "base_model_prefix", "") + "."
    renamed = renaming_of(model)
    found: dict[str, torch.Tensor] = {}
    covered = 0
    for name in bank.names:
        tensor = live_tensor(name, parameters, prefix)
        if tensor is None and (other := renamed(name)) != name and other in parameters:
            tensor = same_shape(parameters[other], bank.layout.tensors[name].shape)
        if tensor is not None:
            found[name] = tensor
            covered += tensor.numel()
        elif (statistic := live_tensor(name, stored, prefix)) is not None and not is_computed_buffer(name):
            found[name] = statistic  # what a normalisation has measured in training is merged as weights are
        elif not (
            name in buffers or prefix + name in buffers or bank.merged_as(name) != name or is_computed_buffer(name)
        ):
            raise EvomergeError(
                f"{bank.models.base.path}: transformers' {type(model).__name__} has no parameter for the tensor {name}"
            )
    total = sum(p.numel() for p in parameters.values())
    if covered != total:
        raise EvomergeError(
            f"{bank.models.base.path}: its files hold {covered:,} of the {total:,} weights of "
            f"transformers' {type(model).__name__}; the checkpoint is incomplete"
        )
    return found


def renaming_of(model: Any) -> Callable[[str], str]:
    """The names under which transformers keeps the tensors of a checkpoint, for classes that it has changed since.

    Returns a function from a checkpoint's name to the live model's; what transformers joins or divides keeps its name.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [part for part in get_model_conversion_mapping(model) if isinstance(part, WeightRenaming)]
        meta = model.state_dict()
    except Exception:  # they are no public functions, and the model may not be transformers'
        return lambda name: name
    return lambda name: str(rename_source_key(name, renamings, [], model.base_model_prefix, meta)[0])


def same_shape(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """A tensor if it has this shape, else None."""
    return tensor if tuple(tensor.shape) == tuple(shape) else None


def live_tensor(name: str, parameters: dict[str, torch.Tensor], prefix: str) -> torch.Tensor | None:
    """The part of the live model that holds a checkpoint tensor; None if there is none.

    name: in the checkpoint.  Older ones lack the model's prefix (`h.0.` for `transformer.h.0.`) or have another name
        for the head.
    parameters: the live model's, by name.
    prefix: of the model's own parameters, `base_model_prefix` and a dot.
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
    folder: Path,
    base: Path | None,
    dtype: Dtype,
    device: torch.device,
    wanted: Dtype | Literal["auto"] = "auto",
    language: bool = True,
) -> tuple[Any, Any]:
    """Open a model to score, and its tokenizer.  An adapter is merged onto `base` like any recipe.

    dtype: the type to which its weights are rounded.
    wanted: the type to compute in; `auto` measures which is faster (`compute_dtype.py`).
    language: whether it is a causal language model, see `load_live_model`; else it may have no tokenizer (None).

    EvomergeError if the folder is an adapter and no base is given, or transformers cannot open the model.
    """
    whole = whole_model(folder, base)
    config, (_, tensors) = read_config(whole), open_weight_files(whole)  # they report what is wrong with the files
    if wanted == "auto" and "quantization_config" in config:
        wanted = dtype  # quantised layers choose the type of their products
    elif wanted == "auto":
        shapes = (tuple(part.get_shape()) for _, part in tensors.values())
        wanted = faster_type(dtype, measure(dtype, device.type, shapes))
    types = TORCH_DTYPES[dtype], TORCH_DTYPES[wanted]
    if whole == folder:
        return load_live_model(folder, types[0], device, types[1], language), tokenizer_in(folder, language)
    models = with_adapter(whole, folder)
    bank = Bank(models, device)
    model = candidate_model(bank, *types, language)
    source = RecipeSource(name="source", path=str(folder))
    base_model = Model(path=str(whole))
    vocabulary = models.requested_vocabulary
    recipe = Recipe(method="linear", dtype=dtype, base=base_model, sources=[source], vocabulary=vocabulary)
    materialise(recipe, bank, destinations(model, bank))
    return model, tokenizer_in(bank.models.tokenizer_folder, language)


def whole_model(folder: Path, base: Path | None) -> Path:
    """The folder itself, or the base if the folder has an adapter.  EvomergeError if it has and there is no base."""
    is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    if is_adapter and base is None:
        raise EvomergeError(f"{folder}: is an adapter; name its base model with --base")
    return base if is_adapter and base is not None else folder


def with_adapter(base: Path, adapter: Path) -> Models:
    """A base and an adapter on it, opened, in the vocabulary of the adapter, which may have added tokens."""
    return open_models(base, {"source": adapter}, vocabulary="source" if read_vocabulary(adapter) else None)


def locate_live_model(model: str, base: str | None, language: bool = True) -> tuple[Path, Path | None]:
    """The folders of a model to score and of its base, if it has one.

    model, base: folders, or hub ids; the headers of these are downloaded and checked before their weights.
    language: see `open_live_model`.

    EvomergeError if `open_live_model` could not open them.
    """
    names = [model, *([base] if base else [])]
    with before_download(names) as headers:
        if headers.folders:
            found, below = (locate(headers.stand_in(name)) for name in (model, base or model))
            check_headers(found, below if base else None, language)
    fetch(names)
    return locate(model), locate(base) if base else None


def check_headers(folder: Path, base: Path | None, language: bool) -> None:
    """EvomergeError if `open_live_model` could not open a model, as far as that can be told without its weights."""
    from transformers import AutoConfig

    whole = whole_model(folder, base)
    open_weight_files(whole)
    if whole != folder:
        with_adapter(whole, folder)
    config = read_config(whole)
    with opening_errors(whole, config, language), torch.device("meta"):
        known = AutoConfig.from_pretrained(whole, local_files_only=True, trust_remote_code=False)
        built(live_class(config, language), known, torch.float32)


def tokenizer_in(folder: Path, language: bool) -> Any:
    """The tokenizer in a folder; only a model that is no language model may have none (None)."""
    return open_tokenizer(folder) if language else optional_tokenizer(Vocabulary({}, folder))
