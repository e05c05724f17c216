"""What identifies the files of a model: their SHA-256, and quicker, their size and time of change."""

from pathlib import Path

from evomerge.files.read import sha256

TOKENS = ("merges.txt", "vocab.txt")


def model_files(folder: Path) -> list[Path]:
    """The files that decide what a model computes: weights, configurations, tokenizer, chat template.

    folder: of the model, or its only file.
    """
    if folder.is_file():
        return [folder]
    return sorted(
        p
        for p in folder.iterdir()
        if (p.is_file() and p.suffix in (".safetensors", ".json", ".jinja", ".model")) or p.name in TOKENS
    )


def model_fingerprint(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a model, by the file's name."""
    return {p.name: sha256(p) for p in model_files(folder)}


def file_stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of change and inode of each file of a model, by name; they differ if a file is replaced."""
    return {p.name: ((s := p.stat()).st_size, s.st_mtime_ns, s.st_ino) for p in model_files(folder)}
