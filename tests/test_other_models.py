"""Models that are no language models: encoders, sequence to sequence, vision, audio, diffusion, plain tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_family
from safetensors.torch import load_file, save_file
from small_models import KINDS, model_class, write_small

import evomerge
from evomerge.api.merge import read_merge
from evomerge.api.reproduce import reproduce
from evomerge.errors import EvomergeError
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import materialise
from evomerge.merge.recipe.open_bank import open_bank


def mean_of(folder: Path, ending: str = "") -> dict[str, Any]:
    """The recipe of the mean of folder/one and folder/two."""
    sources = [{"name": n, "path": folder / f"{n}{ending}"} for n in ("one", "two")]
    return {"method": "linear", "dtype": "float32", "base": {"path": folder / f"base{ending}"}, "sources": sources}


def merged(folder: Path, ending: str = "") -> Path:
    evomerge.merge(mean_of(folder, ending), out=folder / "out", show=False)
    return folder / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_has_the_mean_of_every_tensor_and_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    write_small(tmp_path, kind)
    found, info = model_class(kind).from_pretrained(merged(tmp_path), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    one, two = (model_class(kind).from_pretrained(tmp_path / n).state_dict() for n in ("one", "two"))
    for name, tensor in found.state_dict().items():
        assert torch.allclose(tensor, (one[name] + two[name]) / 2 if tensor.is_floating_point() else one[name]), name
    assert f"import {KINDS[kind][0]}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["bert", "t5", "vit", "resnet", "wav2vec2"])
def test_the_live_model_is_the_exported_one(kind: str, tmp_path: Path) -> None:
    """transformers keeps the tensors of a ViT under other names; those of a ResNet include statistics."""
    write_small(tmp_path, kind)
    recipe, _ = read_merge(mean_of(tmp_path))
    bank = open_bank(recipe)
    live = candidate_model(bank, torch.float32, language=False)
    assert type(live) is model_class(kind)
    materialise(recipe, bank, destinations(live, bank))
    exported = model_class(kind).from_pretrained(merged(tmp_path)).state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in live.state_dict().items())


def test_an_adapter_of_a_classifier_merges_as_peft_merges_it(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    write_small(tmp_path, "bert")
    given = LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"], init_lora_weights=False
    )
    trained = get_peft_model(model_class("bert").from_pretrained(tmp_path / "base"), given)
    with torch.no_grad():
        trained.base_model.model.classifier.modules_to_save["default"].weight.add_(0.1)
    trained.save_pretrained(tmp_path / "lora")
    found = model_class("bert").from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(found, tmp_path / "lora").merge_and_unload().state_dict()
    evomerge.merge(mean_of(tmp_path) | {"sources": [{"name": "it", "path": tmp_path / "lora"}]}, out=tmp_path / "out")
    for name, tensor in model_class("bert").from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def write_beside(folder: Path) -> None:
    """What an image model and a sentence-transformers model have beside their weights."""
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    whole = {"path": "", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([whole, pooling]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "preprocessor_config.json").write_text('{"size": 16, "auto_map": {"AutoImageProcessor": "own.Images"}}')
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    (folder / "own.py").write_text("raise SystemExit")


def test_what_lies_beside_the_weights_is_the_bases_and_no_code(tmp_path: Path) -> None:
    write_small(tmp_path, "embedding", beside=write_beside)
    out = merged(tmp_path)
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"size": 16}
    assert json.loads((out / "1_Pooling" / "config.json").read_text()) == {"pooling_mode_mean_tokens": True}
    assert (out / "vocab.txt").read_text() == (tmp_path / "base" / "vocab.txt").read_text()
    assert not (out / "own.py").exists()
    (tmp_path / "base" / "modules.json").write_text('[{"path": "../one", "type": "sentence_transformers.models.X"}]')
    with pytest.raises(EvomergeError, match="names a folder outside its own"):
        evomerge.merge(mean_of(tmp_path), out=tmp_path / "second", show=False)


def write_tensors(file: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"unet.down_blocks.0.conv.weight": (4, 3), "unet.bias": (5,)}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, file)


def test_a_plain_file_is_found_beside_its_recipe(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one")):
        write_tensors(tmp_path / "plain" / f"{name}.safetensors", seed)
    content = {"method": "linear", "base": {"path": "plain/base.safetensors"}, "recipe": 1}
    content["sources"] = [{"name": "one", "path": "plain/one.safetensors"}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    evomerge.merge(tmp_path / "recipe.yaml", out=tmp_path / "out", show=False)
    assert (tmp_path / "out" / "base.safetensors").is_file()


def test_plain_files_and_components_of_a_pipeline_keep_their_names(tmp_path: Path) -> None:
    component = tmp_path / "pipeline"
    for seed, name in enumerate(("base", "one", "two")):
        write_tensors(tmp_path / f"{name}.safetensors", seed)
        write_tensors(component / name / "diffusion_pytorch_model.safetensors", seed)
        (component / name / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "sample_size": 8}')
    plain, unet = merged(tmp_path, ".safetensors"), merged(component)
    assert sorted(f.name for f in plain.iterdir()) == ["README.md", "base.safetensors", "recipe.yaml"]
    assert json.loads((unet / "config.json").read_text()) == {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
    }
    assert "from diffusers import UNet2DConditionModel" in (unet / "README.md").read_text()
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    for file in (plain / "base.safetensors", unet / "diffusion_pytorch_model.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.allclose(tensor, (one[name] + two[name]) / 2)
    assert reproduce(plain / "recipe.yaml", tmp_path / "again", plain, "cpu").is_same


def test_a_language_model_still_needs_its_tokenizer(tmp_path: Path) -> None:
    write_family(tmp_path)
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(EvomergeError, match="base: no tokenizer in"):
        merged(tmp_path)
