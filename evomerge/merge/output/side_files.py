"""What lies beside a model's weights and is not its tokenizer: settings of processors, and of sentence-transformers.

All of it is the base's.  Nothing is copied that names Python code.
"""

from collections.abc import Iterator
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.files.read import copy_model_file, read_text
from evomerge.parse import parse_json
from evomerge.sources.tokenizer import drop_code

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
SENTENCES = ("config_sentence_transformers.json", "sentence_bert_config.json")
MODULES = "modules.json"  # the list of a sentence-transformers model: its transformer, pooling, and so on


def copy_side_files(base: Path, folder: Path) -> list[str]:
    """Copy the base's files that are neither weights nor tokenizer into a new folder.

    Returns what the user should know about them, a line each.  EvomergeError if one of them cannot be copied.
    """
    for name in PROCESSORS:
        if (base / name).is_file():
            copy_model_file(base / name, folder / name)
            drop_code(folder / name)
    return list(copy_modules(base, folder)) if (base / MODULES).is_file() else []


def copy_modules(base: Path, folder: Path) -> Iterator[str]:
    """Copy what a sentence-transformers model has beside its transformer: each module has a sub-folder."""
    modules = parse_json(read_text(base / MODULES), str(base / MODULES))
    for module in modules if isinstance(modules, list) else [None]:
        kind = module.get("type") if isinstance(module, dict) else None
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            yield f"{base / MODULES}: names something else than a module of sentence-transformers; not copied"
            return
    for module in modules:
        name = str(module.get("path", ""))
        if Path(name).name != name or name == "..":
            raise EvomergeError(f"{base / MODULES}: names a folder outside its own: {name!r:.60}")
        for file in ("config.json", "model.safetensors") if name else ():
            if (base / name / file).is_file():
                (folder / name).mkdir(exist_ok=True)
                copy_model_file(base / name / file, folder / name / file)
                if file != "config.json":
                    yield f"{name}/{file}: is not merged; it is the base's"
    for name in (MODULES, *SENTENCES):
        if (base / name).is_file():
            copy_model_file(base / name, folder / name)
