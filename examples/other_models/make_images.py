"""Make a small vision model, two specialists of it and their images: python make_images.py OUT

A ViT says "first" or "second" of noisy images of 16 x 16 pixels: stripes across or down, a square or a ring.  The base
knows a little of both, `lines` was trained on stripes, `blobs` on squares and rings.  OUT gets base/, lines/, blobs/,
the images as PNG files in images/, and the items, lines.jsonl and blobs.jsonl.

It needs Pillow (`pip install pillow`) and takes some seconds on one core.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

SETS = {"lines": [0, 1], "blobs": [2, 3]}  # set -> its shapes; the label of a shape is 0 or 1
SIDE, BATCH = 16, 32
BASE_STEPS, BASE_RATE = 60, 2e-3
STEPS, RATE = 60, 1e-3


def draw(kind: int, chance: np.random.Generator) -> Any:
    """A noisy image of a shape, (SIDE, SIDE, 3) bytes: stripes across or down, a square, a ring."""
    image = chance.normal(100, 45, (SIDE, SIDE, 3))
    rows, columns = np.indices((SIDE, SIDE))
    if kind < 2:
        shape = ((rows, columns)[kind] + chance.integers(4)) % 4 < 2
    else:
        away = np.maximum(*(np.abs(places - chance.integers(5, 11)) for places in (rows, columns)))
        shape = (away <= 3) & (away >= 2 * (kind - 2))
    return np.clip(image + 70 * shape[:, :, None], 0, 255).astype(np.uint8)


def train(model: Any, kinds: Sequence[int], steps: int, rate: float, processor: Any, seed: int) -> Any:
    """Train a copy of a model on fresh images of the given shapes."""
    torch.manual_seed(seed)
    model, chance = copy.deepcopy(model).train(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        drawn = chance.choice(kinds, BATCH)
        pixels = processor(images=[Image.fromarray(draw(k, chance)) for k in drawn], return_tensors="pt")
        optimizer.zero_grad()
        model(**pixels, labels=torch.from_numpy(drawn % 2)).loss.backward()
        optimizer.step()
    return model.eval()


def make(out: Path, items: int = 500) -> None:
    """Write base, specialists, images and items into a folder.  items: of each set."""
    torch.manual_seed(0)
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    config = ViTConfig(
        image_size=SIDE, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=2,
    )  # fmt: skip
    start = ViTForImageClassification(config)
    trained = {"base": train(start, range(4), BASE_STEPS, BASE_RATE, processor, 0)}
    for seed, (name, kinds) in enumerate(SETS.items(), 1):
        trained[name] = train(trained["base"], kinds, STEPS, RATE, processor, seed)
    for name, model in trained.items():
        model.save_pretrained(out / name)
        processor.save_pretrained(out / name)
    folder = out.resolve() / "images"
    folder.mkdir(exist_ok=True)
    for seed, (name, kinds) in enumerate(SETS.items(), 10):
        chance, lines = np.random.default_rng(seed), []
        for number in range(items):
            kind = int(chance.choice(kinds))
            file = folder / f"{name}-{number}.png"
            Image.fromarray(draw(kind, chance)).save(file)
            lines.append(json.dumps({"image": str(file), "label": kind % 2}) + "\n")
        (out / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    make(parser.parse_args().out)
