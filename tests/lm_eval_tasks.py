"""lm-eval tasks as people write them: a YAML file and its data."""

import json
from pathlib import Path
from typing import Any

import yaml


def write_task(folder: Path, name: str, docs: list[dict[str, Any]], **content: Any) -> Path:
    """A task file and its test data; `train` and `validation` are documents of these splits."""
    data = {"test": f"{name}.jsonl"}
    write_lines(folder / data["test"], docs)
    for split in ("train", "validation"):
        if split in content:
            data[split] = f"{name}.{split}.jsonl"
            write_lines(folder / data[split], content.pop(split))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data},
        "test_split": "test",
        "target_delimiter": "",
    } | content
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


def write_lines(file: Path, docs: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs), encoding="utf-8")


def metrics(*names: str) -> list[dict[str, str]]:
    return [{"metric": name} for name in names]
