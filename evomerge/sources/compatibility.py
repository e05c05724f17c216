"""Can these models be merged?  Every mismatch is one line; nothing is loaded to find out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evomerge.sources.adapter import Adapter
from evomerge.sources.anatomy import KNOWN_MODEL_TYPES, layer_count, place
from evomerge.sources.checkpoint import TIED_HEADS, Checkpoint, read_json
from evomerge.sources.locate import looks_like_hub_id

# What decides the meaning of a weight: two models that differ here compute different functions of it.
CONFIG_KEYS = """
    model_type architectures hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head
    num_key_value_heads head_dim intermediate_size n_inner hidden_act activation_function vocab_size
    tie_word_embeddings num_experts num_local_experts num_experts_per_tok
""".split()
DEPTH_KEYS = ("num_hidden_layers", "n_layer")


@dataclass
class Compatibility:
    """problems: why these cannot be merged.  notes: what to know when they are."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(base: Checkpoint, sources: dict[str, Checkpoint | Adapter], any_depth: bool = False) -> Compatibility:
    """Compare each source (by name) with the base: architecture, tensors, tokenizer, declared base model.

    any_depth: the stacks are taken apart and put together again, so only what is outside them is compared here.
    """
    found = Compatibility()
    model_type = base.config.get("model_type")
    if model_type not in KNOWN_MODEL_TYPES:
        found.notes.append(
            f"base: unknown architecture {model_type!r}; layers are taken from the numbers in the tensor names "
            f"({layer_count(list(base.tensors))} found)"
        )
    vocabulary = read_vocabulary(base.path)
    if vocabulary is None:
        found.problems.append(f"base: no tokenizer in {base.path} (tokenizer.json, or vocab.json and merges.txt)")
    for name, source in sources.items():
        if isinstance(source, Checkpoint):
            compare_config(name, base, source, found, any_depth)
            compare_tensors(name, base, source, found, any_depth)
        else:
            changed = len(source.pairs.keys() | source.whole.keys())
            found.notes.append(f"{name}: LoRA adapter, changes {changed} of {len(base.tensors)} tensors")
        compare_vocabulary(name, vocabulary, source, found)
        compare_declared_base(name, base, source, found)
    return found


def compare_config(
    name: str, base: Checkpoint, source: Checkpoint, found: Compatibility, any_depth: bool = False
) -> None:
    for key in CONFIG_KEYS:
        if any_depth and key in DEPTH_KEYS:
            continue
        ours, theirs = base.config.get(key), source.config.get(key)
        if ours == theirs:
            continue
        if key == "tie_word_embeddings" and (ours is None or theirs is None):
            continue
        line = f"{name}: {key} is {theirs!r}, in the base model {ours!r}"
        (found.notes if key == "tie_word_embeddings" else found.problems).append(line)


def compare_tensors(
    name: str, base: Checkpoint, source: Checkpoint, found: Compatibility, any_depth: bool = False
) -> None:
    ours, theirs = (
        [t for t in model.tensors if not (any_depth and place(t).layer is not None)] for model in (base, source)
    )
    missing = [t for t in ours if t not in source.tensors]
    extra = [t for t in theirs if t not in base.tensors]
    for tensor in list(missing):
        if tensor in TIED_HEADS and source.embedding_name:
            found.notes.append(f"{name}: does not store {tensor}; its tied embedding stands for it")
            missing.remove(tensor)
    for tensor in list(extra):
        if tensor in TIED_HEADS and base.ties_head:
            found.notes.append(f"{name}: stores {tensor}, which the base model ties to its embedding; not used")
            extra.remove(tensor)
    if missing:
        found.problems.append(f"{name}: lacks {len(missing)} tensor(s) of the base model: {some(missing)}")
    if extra:
        found.problems.append(f"{name}: has {len(extra)} tensor(s) that the base model lacks: {some(extra)}")
    shapes = [t for t in ours if t in source.tensors and base.tensors[t].shape != source.tensors[t].shape]
    if shapes:
        first = shapes[0]
        found.problems.append(
            f"{name}: {len(shapes)} tensor(s) of another shape, the first is {first}: "
            f"{source.tensors[first].shape}, in the base model {base.tensors[first].shape}"
        )


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id, added tokens included; None if the folder has no tokenizer that can be read."""
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").exists():
        try:
            return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True))
        except Exception:  # the library raises a bare Exception for a broken file
            return None
    if (folder / "vocab.json").exists():
        return {str(k): int(v) for k, v in read_json(folder / "vocab.json").items()}
    if (folder / "tokenizer.model").exists():
        from transformers import AutoTokenizer

        return dict(AutoTokenizer.from_pretrained(folder).get_vocab())
    return None


def compare_vocabulary(
    name: str, vocabulary: dict[str, int] | None, source: Checkpoint | Adapter, found: Compatibility
) -> None:
    theirs = read_vocabulary(source.path)
    if theirs is None:
        if isinstance(source, Checkpoint):
            found.notes.append(f"{name}: has no tokenizer of its own; the base model's is taken to be its")
        return
    if vocabulary is None or theirs == vocabulary:
        return
    moved = sorted(t for t in vocabulary.keys() & theirs.keys() if vocabulary[t] != theirs[t])
    only_theirs, only_ours = theirs.keys() - vocabulary.keys(), vocabulary.keys() - theirs.keys()
    parts = []
    if moved:
        parts.append(f"{len(moved)} tokens have other ids (the first is {moved[0]!r})")
    if only_theirs:
        parts.append(f"{len(only_theirs)} tokens are not in the base model's (such as {min(only_theirs)!r})")
    if only_ours:
        parts.append(f"{len(only_ours)} of the base model's are missing (such as {min(only_ours)!r})")
    found.problems.append(f"{name}: another tokenizer: " + "; ".join(parts))


def declared_base(source: Checkpoint | Adapter) -> str | None:
    """The base model that a source says it comes from: its config, or its model card's front matter."""
    for key in ("base_model_name_or_path", "base_model"):
        if isinstance(source.config.get(key), str) and source.config[key]:
            return str(source.config[key])
    declared = front_matter(source.path).get("base_model")
    if isinstance(declared, list):
        declared = declared[0] if len(declared) == 1 else None
    return declared if isinstance(declared, str) else None


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML block on top of a model card, {} if there is none."""
    card = folder / "README.md"
    if not card.exists():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        block = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # 2024-02-31 is a ValueError
        return {}
    return block if isinstance(block, dict) else {}


def compare_declared_base(name: str, base: Checkpoint, source: Checkpoint | Adapter, found: Compatibility) -> None:
    declared = declared_base(source)
    if declared is None:
        return
    here = {base.path.name.lower(), str(base.config.get("_name_or_path", "")).split("/")[-1].lower()}
    # A hub snapshot lies under models--owner--name/snapshots/<commit>.
    here |= {part.split("--")[-1].lower() for part in base.path.parts if part.startswith("models--")}
    if declared.rstrip("/").split("/")[-1].lower() not in here:
        kind = "hub model" if looks_like_hub_id(declared) else "model"
        found.notes.append(
            f"{name}: says it was trained from the {kind} {declared!r}; the base here is {base.path.name!r}"
        )
