"""A model's folder is data: no file elsewhere is read through it, and no code in it has a meaning."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from models import write_adapter, write_llama
from searches import run_cli

from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.load_merge import load_merge
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.open_models import open_models, open_source
from evomerge.sources.tokenizer import drop_code, open_tokenizer


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_a_model_s_links_to_other_files_are_not_copied(name: str, tiny_family: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    base = Path(shutil.copytree(tiny_family / "base", tmp_path / "base"))
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    recipe = tmp_path / "recipe.yaml"
    source = {"name": "add", "path": str(tiny_family / "add"), "parameters": {"weight": 0.5}}
    recipe.write_text(yaml.safe_dump({"base": {"path": str(base)}, "sources": [source], "method": "task_arithmetic"}))
    done = run_cli("merge", recipe, "--out", tmp_path / "merged")
    assert done.returncode == 2, done.stderr
    assert f"{name}: is a symbolic link to {tmp_path / 'secret'}" in done.stderr
    assert not (tmp_path / "merged").exists()
    (base / name).unlink()
    (blobs := tmp_path / "blobs").mkdir()
    (blobs / "1f2e").write_text("{}")
    (base / name).symlink_to(blobs / "1f2e")  # as a hub's cache has it
    assert run_cli("merge", recipe, "--out", tmp_path / "merged").returncode == 0
    assert (tmp_path / "merged" / name).read_text() == "{}"
    assert not (tmp_path / "merged" / name).is_symlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "adapter_config.json"])
def test_a_stray_link_in_a_model_s_folder_is_refused_when_it_is_opened(name: str, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    folder = write_adapter(tmp_path / "it", base) if name.startswith("adapter") else write_llama(tmp_path / "it", 1)
    (tmp_path / "other").mkdir()
    secret = (folder / name).rename(tmp_path / "other" / "secret")
    (folder / name).symlink_to(secret)
    for act in (lambda: open_models(base, {"it": folder}), lambda: open_source(folder, open_checkpoint(base))):
        with pytest.raises(EvomergeError, match=f"{name}: is a symbolic link to {secret}, a file of another name"):
            act()
    for cached in (tmp_path / "other" / name, tmp_path / "other" / f"SHA256E-s9--{'0123456789abcdef' * 4}.bin"):
        secret = secret.rename(cached)
        (folder / name).unlink()
        (folder / name).symlink_to(cached)
        open_models(base, {"it": folder})
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # leads to itself
    with pytest.raises(EvomergeError):
        open_models(base, {"it": folder})


def test_mergekit_takes_no_chat_template_through_a_stray_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the user's own {")
    base = write_llama(tmp_path / "base")
    (base / "chat_template.jinja").symlink_to(tmp_path / "secret")
    content = {"merge_method": "linear", "models": [{"model": str(base), "parameters": {"weight": 1.0}}]}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(content | {"chat_template": "auto", "dtype": "float32"}))
    with pytest.raises(EvomergeError, match=f"jinja: is a symbolic link to {tmp_path / 'secret'}"):
        load_merge(tmp_path / "merge.yml")


def test_files_that_a_model_names_are_beside_it_or_are_not_opened(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", shards=2)
    os.mkfifo(pipe := tmp_path / "pipe")  # whoever opens it waits
    settings = json.loads((base / "tokenizer_config.json").read_text())
    for key in ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "chat_template_file"):
        settings[key] = str(pipe)
    settings |= {"fast_tokenizer_files": ["../pipe"], "name_or_path": str(pipe), "gguf_file": str(pipe)}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert len(open_tokenizer(base)) > 1
    (tmp_path / "mergekit_config.yml").write_text("merge_method: [")
    (base / "mergekit_config.yml").symlink_to(pipe)  # is never looked for
    (base / "recipe.yaml").symlink_to(pipe)
    open_models(base, {})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for name, reason in (
        ("../../x", "names a file outside its folder: ../../x"),
        (str(pipe), "names a file outside its folder"),
        ("a\0b", "missing file"),
        ("pipe", "not an ordinary file|missing file"),
    ):
        changed = {"weight_map": index["weight_map"] | {"x": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(EvomergeError, match=reason):
            open_checkpoint(base)
    many = {"weight_map": {str(k): f"{k}.safetensors" for k in range(10_001)}}
    (base / "model.safetensors.index.json").write_text(json.dumps(many))
    with pytest.raises(EvomergeError, match="names 10,001 files"):
        open_checkpoint(base)


def test_the_base_that_an_adapter_names_is_compared_and_nothing_else(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    (far := tmp_path / "far").mkdir()
    (far / "config.json").write_text("{")
    os.mkfifo(tmp_path / "config.json")
    for declared in (str(far), str(tmp_path), "/proc/self/root", "../../../etc", "a\0b", "x" * 10**5, "\x1b[2J"):
        folder = write_adapter(tmp_path / "it", base, base_model_name_or_path=declared)
        models = open_models(base, {"it": folder})
        assert models.base.path == base
        assert isinstance(adapter := models.sources["it"], Adapter)
        assert adapter.base.path == base
        shutil.rmtree(folder)


def test_names_of_code_beside_a_model_are_not_copied(tmp_path: Path) -> None:
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "x": 1}))
    drop_code(settings)
    assert json.loads(settings.read_text()) == {"x": 1}
