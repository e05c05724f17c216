"""docs/how-to/after-the-search.md: what its commands do with a merge of the tiny family."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_adapter, write_llama
from searches import ROOT

from evomerge.api.merge import merge
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource

PAGE = ROOT / "docs" / "how-to" / "after-the-search.md"


def recipe_of(base: Path, source: Path) -> Recipe:
    one = RecipeSource(name="one", path=str(source), parameters={"weight": 0.7})
    return Recipe(method="task_arithmetic", dtype="float32", base=Model(path=str(base)), sources=[one])


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_page_loads_the_model_and_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_llama(tmp_path / "base", 0)
    recipe = recipe_of(base, write_adapter(tmp_path / "lora", base))
    merge(recipe, out=tmp_path / "merged", show=False)
    merge(recipe, out=tmp_path / "adapter", lora="exact", show=False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"base": str(base)}
    logits = []
    for block in blocks[:2]:  # the third one needs a file of llama.cpp
        exec(block, names)
        with torch.no_grad():
            logits.append(names["model"](**names["tokenizer"]("a = 12", return_tensors="pt")).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="transformers[serving] is not installed")
def test_the_server_of_transformers_answers(tiny_family: Path, tmp_path: Path) -> None:
    merge(recipe_of(tiny_family / "base", tiny_family / "add"), out=tmp_path / "merged", show=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "merged/", "--host", "127.0.0.1"]
    command += ["--port", address.rpartition(":")[2]]
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        asked = {"model": "merged/", "prompt": "add 111+222=", "max_tokens": 4, "temperature": 0}
        said = ask(f"http://{address}/v1/completions", asked, server)
    finally:
        server.kill()
        server.wait()
    assert said["usage"]["completion_tokens"] == 4, (tmp_path / "log.txt").read_text()


def ask(address: str, content: dict[str, Any], server: subprocess.Popen[bytes]) -> Any:
    """A server's answer, as soon as it answers."""
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    until = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except (ConnectionError, urllib.error.URLError):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.5)
