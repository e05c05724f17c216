"""Merging a model larger than memory: what is held is a few tensors, not the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import write_tokenizer
from safetensors import safe_open

from evomerge.merge.output.shards import open_writer

LARGEST = 100 << 20  # bytes of the largest tensor
LAYERS = 8
WATCHED = """
import resource, sys, threading, time
from pathlib import Path
peak = 0
def watch():
    global peak
    while True:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
from evomerge.cli import main
sys.argv = ["evomerge", *sys.argv[1:]]
try:
    main()
finally:
    print("peak", peak)
"""


def write_large(folder: Path, seed: int) -> None:
    """A Llama of one wide embedding and a few layers, 750 MB in bfloat16, written tensor by tensor."""
    folder.mkdir(parents=True)
    hidden, inner = 2048, 4096
    shapes = {"model.embed_tokens.weight": (LARGEST // 2 // hidden, hidden)}
    for i in range(LAYERS):
        stem = f"model.layers.{i}."
        shapes |= {f"{stem}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{stem}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes |= {f"{stem}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{stem}{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (hidden,)}
    generator = torch.Generator().manual_seed(seed)
    with open_writer(folder / "model.safetensors", {n: (torch.bfloat16, s) for n, s in shapes.items()}) as writer:
        for shape in shapes.values():
            writer.write((0.02 * torch.randn(shape, generator=generator)).bfloat16())
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
              "intermediate_size": inner, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
              "vocab_size": LARGEST // 2 // hidden, "tie_word_embeddings": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_a_merge_holds_less_than_two_of_its_largest_tensors_and_half_a_gigabyte(method: str, tmp_path: Path):
    recipe = [f"recipe: 1\nmethod: {method}\nbase: {{path: base}}\nsources:"]
    for seed, name in enumerate(["base", "one", "two", "three"]):
        write_large(tmp_path / name, seed)
        if name != "base":
            parameters = "{weight: 0.4, density: 0.5}" if method == "ties" else "{weight: 0.4}"
            recipe.append(f"  - {{name: {name}, path: {name}, parameters: {parameters}}}")
    total = sum((tmp_path / n / "model.safetensors").stat().st_size for n in ("base", "one", "two", "three"))
    assert total > 3e9
    (tmp_path / "recipe.yaml").write_text("\n".join(recipe) + "\n")
    command = [sys.executable, "-c", WATCHED, "merge", "recipe.yaml", "--out", "merged"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak")[1])
    assert peak < 2 * LARGEST + 500e6, f"{peak / 1e6:.0f} MB"
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [LARGEST // 2 // 2048, 2048]
