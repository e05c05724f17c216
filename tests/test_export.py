"""One way to merge: what was scored in memory is what lies on disk, byte for byte, and can be made again."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    HIDDEN,
    llama_weights,
    write_adapter,
    write_family,
    write_llama,
    write_statistics,
    write_tokenizer,
    write_weights,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.utils import logging

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.files.new_folder import new_folder
from evomerge.merge.bank.bank import Bank
from evomerge.merge.live import destinations, load_live_model
from evomerge.merge.materialise import NotFinite, materialise
from evomerge.merge.methods import METHODS
from evomerge.merge.output.compare import model_differences
from evomerge.merge.output.export import export, output_specs, total_bytes
from evomerge.merge.output.model_card import model_card
from evomerge.merge.output.shards import plan_shards
from evomerge.merge.recipe.coefficients import Coefficient
from evomerge.merge.recipe.pinned_inputs import check_fingerprints
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, load_recipe
from evomerge.sources.adapter.tensor_change import low_rank_product
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.open_models import open_models

logging.disable_progress_bar()


def recipe_for(
    folders: dict[str, Path], method: str = "linear", dtype: Any = "bfloat16", **parameters: Coefficient
) -> Recipe:
    """A recipe over every folder but the base, or as many as the method takes; required knobs are 0.6."""
    silent = [k for k, v in METHODS[method].knobs.items() if v.default is None and k not in parameters]
    names = [name for name in folders if name != "base"][: METHODS[method].sources[1]]
    sources = [RecipeSource(name=name, path=str(folders[name])) for name in names]
    if kind := METHODS[method].statistics:
        for source in sources:
            file = Path(source.path).parent / f"{source.name}.{kind}"
            source.statistics = str(write_statistics(file, kind, Path(source.path)))
    base = Model(path=str(folders["base"]))
    parameters |= dict.fromkeys(silent, 0.6)
    return Recipe(method=method, dtype=dtype, seed=7, base=base, sources=sources, parameters=parameters)


def bank_of(folders: dict[str, Path]) -> Bank:
    return Bank(open_models(folders["base"], {n: f for n, f in folders.items() if n != "base"}))


def exported(folders: dict[str, Path], recipe: Recipe, folder: Path, **options: Any) -> Path:
    export(recipe, bank_of(folders), folder, model_card, **options)
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    return write_family(tmp_path / "models", dtype=torch.bfloat16)


# --- What is scored is what is written ---

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
SIZES |= {"vocab_size": 40, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FEED = {"intermediate_size": 24}
SHARED = {"num_key_value_heads": 1}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **FEED),
    "llama, tied": LlamaConfig(**SIZES, **FEED, tie_word_embeddings=True),
    "gpt2": GPT2Config(**SIZES),
    "qwen2": Qwen2Config(**SIZES, **FEED, **SHARED),
    "qwen2, tied": Qwen2Config(**SIZES, **FEED, **SHARED, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**SIZES, **FEED),
    "mixtral": MixtralConfig(**SIZES, **FEED, **SHARED, num_local_experts=3),
}


def write_relatives(folder: Path, config: PreTrainedConfig) -> dict[str, Path]:
    """A base as transformers saves it and two perturbed copies."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folders = {name: folder / name for name in ("base", "one", "two")}
    for path in folders.values():
        model.save_pretrained(path)
        write_tokenizer(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return folders


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_linear"])
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_model_merged_in_memory_is_the_exported_one_bit_for_bit(
    config: PreTrainedConfig, method: str, tmp_path: Path
):
    folders = write_relatives(tmp_path, config)
    recipe, bank = recipe_for(folders, method), bank_of(folders)
    live = load_live_model(folders["base"], torch.bfloat16, torch.device("cpu"))
    before = {name: p.clone() for name, p in live.named_parameters()}
    places = destinations(live, bank)
    materialise(recipe, bank, places)
    out = exported(folders, recipe, tmp_path / "merged")

    written = tensors_in(out)
    assert all(same_bits(written[name], place) for name, place in places.items())
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert opened.dtype == torch.bfloat16
    for (name, here), (other, there) in zip(live.named_parameters(), opened.named_parameters(), strict=True):
        assert name == other
        assert same_bits(here.data, there.data), name
        assert not torch.equal(here, before[name]), f"{name} was not overwritten"
    ids = torch.arange(3, 20)[None]
    assert same_bits(live(ids).logits.detach(), opened(ids).logits.detach())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_method_and_type_makes_a_folder_that_transformers_opens(method: str, dtype: str, tmp_path: Path):
    folders = write_family(tmp_path / "models", dtype=torch.float16, tied=True, shards=2)
    out = exported(folders, recipe_for(folders, method, dtype), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == TORCH_DTYPES[dtype]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_the_exported_folder_has_a_tokenizer_and_a_card(family: dict[str, Path], tmp_path: Path):
    out = exported(family, recipe_for(family), tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("a = 12").input_ids) == "a = 12"
    assert "A merge of 2 models by `linear`" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_head_that_the_sources_tie_merges_with_their_embedding(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1, tied=True)}
    out = exported(folders, recipe_for(folders, dtype="float32"), tmp_path / "merged")
    merged = tensors_in(out)
    assert same_bits(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_tables_of_integers_are_the_bases(tmp_path: Path):
    folders = {}
    for seed, name in enumerate(("base", "one")):
        folders[name] = write_llama(tmp_path / name, seed)
        table = torch.arange(3) + 10 * seed
        write_weights(folders[name], llama_weights(seed) | {"model.position_ids": table})
    out = exported(folders, recipe_for(folders), tmp_path / "merged")
    assert torch.equal(tensors_in(out)["model.position_ids"], torch.arange(3))


def test_a_model_with_weights_that_the_files_lack_is_refused(family: dict[str, Path]):
    live = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"num_hidden_layers": 3}, **FEED))
    with pytest.raises(EvomergeError, match="the checkpoint is incomplete"):
        destinations(live, bank_of(family))


# --- The files ---


def test_a_sharded_export_holds_the_same_tensors(family: dict[str, Path], tmp_path: Path):
    recipe = recipe_for(family, "ties", density=0.3)
    whole = exported(family, recipe, tmp_path / "whole")
    shards = exported(family, recipe, tmp_path / "shards", shard_bytes=3000)
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert [d for d in model_differences(whole, shards) if not d.name.endswith(".json")] == []
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(whole).values())
    assert AutoModelForCausalLM.from_pretrained(shards).dtype == torch.bfloat16


@given(limit=st.integers(1, 20_000))
@settings(deadline=None, max_examples=30)
def test_a_shard_is_within_its_limit_or_a_single_tensor(limit: int, tmp_path_factory: pytest.TempPathFactory):
    folders = write_family(tmp_path_factory.mktemp("shards"), ["one"])
    recipe, bank = recipe_for(folders), bank_of(folders)
    shards = list(plan_shards(output_specs(recipe, bank), limit).values())
    size = {name: info.bytes // 2 for name, info in bank.models.base.tensors.items()}  # float32 in, bfloat16 out
    assert [name for shard in shards for name in shard] == bank.names
    assert all(len(shard) == 1 or sum(size[n] for n in shard) <= limit for shard in shards)
    assert all(size[b[0]] + sum(size[n] for n in a) > limit for a, b in pairwise(shards))
    assert total_bytes(recipe, bank) == sum(size.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_recipe_twice_gives_the_same_bytes(method: str, family: dict[str, Path], tmp_path: Path):
    recipe = recipe_for(family, method)
    first = exported(family, recipe, tmp_path / "first")
    second = exported(family, load_recipe(first / "recipe.yaml"), tmp_path / "second")
    assert {f.name for f in first.iterdir()} == {f.name for f in second.iterdir()}
    assert all(f.read_bytes() == (second / f.name).read_bytes() for f in first.iterdir() if f.name != "recipe.yaml")
    assert model_differences(first, second) == []


def test_another_seed_gives_another_dare(family: dict[str, Path], tmp_path: Path):
    recipe = recipe_for(family, "dare_linear", density=0.5)
    first = exported(family, recipe, tmp_path / "first")
    second = exported(family, recipe.model_copy(update={"seed": 8}), tmp_path / "second")
    assert {d.name for d in model_differences(first, second)} == set(tensors_in(first))


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_flipped_byte_is_found_in_its_tensor(tensor: str, family: dict[str, Path], tmp_path: Path):
    first = exported(family, recipe_for(family), tmp_path / "first")
    second = exported(family, recipe_for(family), tmp_path / "second")
    file = second / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + header])[tensor]["data_offsets"]
    content[8 + header + end - 1] ^= 1
    file.write_bytes(content)
    (found,) = model_differences(first, second)
    assert (found.name, found.what) == (tensor, f"1 of {end - begin} bytes differ".replace("1024", "1,024"))


def test_differences_tell_of_types_of_missing_tensors_and_of_other_files(family: dict[str, Path], tmp_path: Path):
    first = exported(family, recipe_for(family), tmp_path / "first")
    second = exported(family, recipe_for(family), tmp_path / "second")
    weights = load_file(second / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    del weights["lm_head.weight"]
    write_weights(second, weights)
    (second / "tokenizer.json").unlink()
    found = {d.name: d.what for d in model_differences(first, second)}
    assert found == {
        "lm_head.weight": f"only in {first}",
        "model.norm.weight": f"torch.bfloat16 ({HIDDEN},) and torch.float32 ({HIDDEN},)",
        "tokenizer.json": "the files differ",
    }


def test_recipe_yaml_holds_the_sums_of_all_that_went_in_and_came_out(family: dict[str, Path], tmp_path: Path):
    out = exported(family, recipe_for(family, "slerp"), tmp_path / "merged", shard_bytes=3000)

    def sums(folder: Path) -> dict[str, str]:
        files = [f for f in folder.iterdir() if f.suffix in (".json", ".safetensors")]
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    recipe = load_recipe(out / "recipe.yaml")
    assert recipe.outputs == sums(out)
    assert recipe.base.sha256 == sums(family["base"])
    assert {s.name: s.sha256 for s in recipe.sources} == {name: sums(family[name]) for name in ("one", "two")}
    check_fingerprints(recipe)


# --- What goes wrong ---


def test_an_interrupted_export_leaves_nothing(family: dict[str, Path], tmp_path: Path):
    def stop(done: int) -> None:
        if done > 5000:
            raise KeyboardInterrupt

    home = tmp_path / "home"
    with pytest.raises(KeyboardInterrupt):
        exported(family, recipe_for(family), home / "merged", progress=stop, shard_bytes=2000)
    assert list(home.iterdir()) == []


def test_progress_counts_every_byte(family: dict[str, Path], tmp_path: Path):
    seen: list[int] = []
    recipe = recipe_for(family)
    exported(family, recipe, tmp_path / "merged", progress=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == total_bytes(recipe, bank_of(family))


def test_a_folder_with_something_in_it_is_not_overwritten(family: dict[str, Path], tmp_path: Path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("years of work")
    with pytest.raises(EvomergeError, match="merged: exists already and is not an empty folder"):
        exported(family, recipe_for(family), tmp_path / "merged")
    assert [f.name for f in (tmp_path / "merged").iterdir()] == ["thesis.txt"]


def test_what_a_killed_export_left_is_cleared_away(family: dict[str, Path], tmp_path: Path):
    with new_folder(tmp_path / "merged") as aside:
        part = Path(shutil.copytree(aside, tmp_path / "merged.99999999.part"))
        (part / "half.safetensors").write_text("half a file")
    shutil.rmtree(tmp_path / "merged")
    out = exported(family, recipe_for(family), tmp_path / "merged")
    assert not part.exists()
    assert not (out / "half.safetensors").exists()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_that_is_not_finite_is_refused_by_name(method: str, value: float, tmp_path: Path):
    folders = write_family(tmp_path / "models", ["one", "two"][: METHODS[method].sources[1]])
    weights = llama_weights(1)
    weights["model.layers.1.mlp.up_proj.weight"][5, 5] = value
    write_weights(folders["one"], weights)
    recipe = recipe_for(folders, method)
    with pytest.raises(EvomergeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        exported(folders, recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    bank = bank_of(folders)
    with pytest.raises(NotFinite, match=r"up_proj"):
        materialise(recipe, bank, {name: torch.empty(bank.base(name).shape) for name in bank.names})


def test_a_weight_too_large_for_the_type_is_refused(family: dict[str, Path], tmp_path: Path):
    recipe = recipe_for(family, "task_arithmetic", "float16", weight=1e8)
    with pytest.raises(EvomergeError, match="no usable model"):
        exported(family, recipe, tmp_path / "merged")


# --- Adapters ---

LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 16}),
    "every layer": ("llama", {"target_modules": "all-linear", "r": 2}),
    "rank-stabilised": ("llama", {"target_modules": ["q_proj", "up_proj"], "r": 4, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "r": 4,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
            "alpha_pattern": {"down_proj": 32, r"layers\.0\.self_attn\.k_proj": 1},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"], "r": 3}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "gpt2's turned weights": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 4}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(("architecture", "config"), LORA.values(), ids=LORA)
def test_an_adapter_alone_is_what_peft_merges(architecture: str, config: dict[str, Any], tmp_path: Path):
    peft = pytest.importorskip("peft", reason="compares with peft, which is not installed")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture], dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "lora")
    expected = adapted.merge_and_unload().state_dict()

    folders = {"base": tmp_path / "base", "lora": tmp_path / "lora"}
    found = AutoModelForCausalLM.from_pretrained(exported(folders, recipe_for(folders), tmp_path / "merged"))
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    changed = 0
    for name, tensor in found.state_dict().items():
        assert torch.allclose(tensor.float(), expected[name], rtol=2**-8, atol=1e-6), name
        changed += not torch.equal(expected[name], original[name])
    assert changed > 0


def test_a_tensor_that_no_adapter_touches_is_the_bases(tmp_path: Path):
    base = write_llama(tmp_path / "base", dtype=torch.bfloat16)
    folders = {"base": base, "a": write_adapter(tmp_path / "a", base, 1), "b": write_adapter(tmp_path / "b", base, 2)}
    original = tensors_in(base)
    for method in ("task_arithmetic", "ties", "dare_ties"):
        merged = tensors_in(exported(folders, recipe_for(folders, method, weight=[0.3, 0.9]), tmp_path / method))
        touched = {name for name in merged if not same_bits(merged[name], original[name])}
        assert touched == {n for n in merged if n.split(".")[-2] in ("q_proj", "v_proj", "down_proj")}, method


@pytest.mark.parametrize(("out", "rank", "inner"), [(1, 1, 1), (3, 2, 5), (64, 16, 48), (5, 3, 40_000), (70_000, 2, 1)])
def test_a_low_rank_product_is_the_matrix_product(out: int, rank: int, inner: int):
    generator = torch.Generator().manual_seed(rank)
    b, a = torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator)
    exact = b.double() @ a.double()
    bound = rank * 2**-23 * (b.double().abs() @ a.double().abs())
    found = low_rank_product(b, a)
    assert found.dtype == torch.float32
    assert ((found - exact).abs() <= bound).all()
    assert torch.equal(
        low_rank_product(b.bfloat16(), a.half()), low_rank_product(b.bfloat16().float(), a.half().float())
    )


def test_a_low_rank_product_adds_rank_by_rank():
    b, a = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1e8], [1.0], [-1e8]])
    assert low_rank_product(b, a).item() == 0.0  # (1e8 + 1) - 1e8 in float32; another order would give 1
