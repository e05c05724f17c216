"""Language models with vision towers, and hybrids with layers that keep a state: merged, scored, searched, exported."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import write_family, write_llama, write_tokenizer
from safetensors.torch import load_file
from searches import ROOT, write_config
from small_models import HYBRID, SEEING, model_class, write_small

import evomerge
from evomerge.api.merge import read_merge
from evomerge.api.reproduce import reproduce
from evomerge.errors import EvomergeError
from evomerge.evaluate.capabilities import Capabilities, logprobs, probe
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.generation import Prompt, Stops, generate, plan_generation
from evomerge.evaluate.loglikelihood import Plan, Row
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import materialise
from evomerge.merge.mergekit.from_recipe import dump_mergekit
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, load_recipe
from evomerge.sources.tensor_names import tensor_role, towers_beside_decoder

SELDOM = ("llava", "qwen2_5_vl", "qwen3_vl", "bamba", "falcon_h1", "granitemoehybrid")
ENDS = range(3, 16)  # tokens that end an answer in these tests
MODELS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SELDOM)) for kind in (*SEEING, *HYBRID)]


def write_beside(folder: Path) -> None:
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 16}')


def mean_of(folder: Path, **more: Any) -> dict[str, Any]:
    """The recipe of the mean of folder/one and folder/two."""
    sources = [{"name": n, "path": folder / n} for n in ("one", "two")]
    return {"method": "linear", "dtype": "float32", "base": {"path": folder / "base"}, "sources": sources} | more


def plain(model: Any, row: Row) -> torch.Tensor:
    """The log-probabilities of a row's scored tokens, (M,), by a forward of the row alone."""
    tokens = torch.tensor([row.tokens])
    found = model(tokens, use_cache=False).logits[0].float().log_softmax(1)[:-1]
    return found.gather(1, tokens[0, 1:, None])[-row.scored :, 0]


def rows() -> list[Row]:
    """Rows of different lengths behind a common prefix."""
    drawn = torch.randint(3, 40, (6, 14), generator=torch.Generator().manual_seed(1)).tolist()
    return [Row((1, 5, 6, 7, *tokens[: 5 + k]), 2 + k % 3) for k, tokens in enumerate(drawn)]


@torch.inference_mode()
def check_scores(model: Any, found: Capabilities) -> None:
    expected = torch.cat([plain(model, row) for row in rows()])
    trunks = [rows()[0].tokens[:4]] if found.trunks else []
    for kept in ([], trunks):  # the second time, the model has seen other sequences before
        scores = logprobs(model, rows(), packs=found.packs, trunks=kept)
        assert torch.allclose(scores, expected, atol=2e-5)


@torch.inference_mode()
def check_answers(model: Any, found: Capabilities) -> None:
    """Answers that are written in batches, of which some rows end early, are those that the model writes alone."""
    prompts = [Prompt(row.tokens, ("</s>",), limit) for row, limit in zip(rows(), (9, 9, 3, 9, 9, 3), strict=True)]

    def alone(prompt: Prompt) -> list[int]:
        tokens = torch.tensor([prompt.context])
        written = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=prompt.limit, do_sample=False,
            eos_token_id=list(ENDS),
        )  # fmt: skip
        return written[0, tokens.shape[1] :].tolist()

    stops = Stops(SimpleNamespace(decode=lambda tokens, **options: "?"), 40, set(ENDS))
    batches = plan_generation(prompts, 0, Plan(4096, model.device, 1, found.packs, None))
    assert len(batches) == 2
    answers = generate(model, batches, len(prompts), stops, Clock(), found.packs)
    assert answers == [alone(prompt) for prompt in prompts]


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_merged_scored_exported_and_made_again(kind: str, tmp_path: Path) -> None:
    write_small(tmp_path, kind, beside=write_beside)
    given = mean_of(tmp_path, keep=["vision", "projector"])
    recipe, _ = read_merge(given)
    bank = open_bank(recipe)
    live = candidate_model(bank, torch.float32)
    assert type(live) is model_class(kind)
    materialise(recipe, bank, destinations(live, bank))
    out = tmp_path / "out"
    evomerge.merge(given, out=out, show=False)
    exported, info = model_class(kind).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, exported.state_dict()[n]) for n, tensor in live.state_dict().items())
    base, one, two, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "one", "two", "out"))
    assert base.keys() == merged.keys()
    for name, tensor in merged.items():
        kept = tensor_role(name).component in ("vision", "projector")
        assert torch.allclose(tensor, base[name] if kept else (one[name] + two[name]) / 2, atol=1e-7), name
        assert tensor_role(name).component != "other", name
    assert (out / "preprocessor_config.json").is_file()
    card = (out / "README.md").read_text()
    assert ("AutoProcessor" in card) == (kind in SEEING)
    assert "Not merged, but the base's: vision, projector." in card
    assert reproduce(out / "recipe.yaml", tmp_path / "again", out, "cpu").is_same
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in live.parameters():  # so that a token depends much on those before it
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = probe(live, 40)
    assert found.packs == (kind in SEEING and kind != "qwen3_5")
    check_scores(live, found)
    assert found.steps
    check_answers(live, found)


@pytest.mark.more
@pytest.mark.parametrize(("kind", "components"), [("gemma3", []), ("qwen2_vl", ["vision"]), ("qwen3_next", ["mlp"])])
def test_a_search_leaves_the_tower_alone_unless_it_is_named(kind: str, components: list[str], tmp_path: Path) -> None:
    write_small(tmp_path, kind, ("rev", "add"), beside=write_tokenizer)
    space = {"weight": [0.2, 0.8], "components": components}
    config = write_config(tmp_path, tmp_path, budget={"trials": 6}, space=space)
    evomerge.search(config, run=tmp_path / "run", show=False)
    said = "a search leaves them at the base unless `components` names them" in (tmp_path / "run/log.txt").read_text()
    assert said == (kind in SEEING)
    run = evomerge.Run(tmp_path / "run")
    run.export(tmp_path / "out", trial=5, show=False)
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.keep == {"gemma3": ["vision", "projector"], "qwen2_vl": [], "qwen3_next": []}[kind]
    base, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    for name, tensor in merged.items():
        kept = tensor_role(name).component in recipe.keep
        assert torch.equal(tensor, base[name]) == kept, name
    model_class(kind).from_pretrained(tmp_path / "out")


def write_llava(folder: Path) -> None:
    """A base and two sources of LLaVA, whose processor takes images and a chat template."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # 40, see small_models.py
    size = {"height": 16, "width": 16}
    each = "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=4, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", image_token="<image>",
        chat_template="{% for m in messages %}{% for c in m.content %}" + each + "{% endfor %}{% endfor %}",
    )  # fmt: skip
    write_small(folder, "llava", beside=processor.save_pretrained)


@pytest.mark.more
def test_the_function_of_the_page_searches_the_towers(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    write_llava(tmp_path)
    drawn = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    items = [{"image": str(tmp_path / f"{k}.png"), "question": "5 = ", "answer": "5"} for k in range(len(drawn))]
    for item, pixels in zip(items, drawn, strict=True):
        images.fromarray(pixels).save(item["image"])
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    page = (ROOT / "docs" / "how-to" / "vision-and-hybrid-models.md").read_text(encoding="utf-8")
    (tmp_path / "looks.py").write_text(page.split("```python\n")[1].split("```")[0])
    task = {"python": str(tmp_path / "looks.py:answer_prob"), "items": str(tmp_path / "items.jsonl")}
    space = {"weight": [0.2, 2.0], "components": ["vision", "projector"]}
    content = {"name": "looks", "base": str(tmp_path / "base"), "method": "task_arithmetic", "space": space}
    content |= {"sources": [{"name": n, "path": str(tmp_path / n)} for n in ("one", "two")], "tasks": [{"task": task}]}
    content |= {"splits": {"search": 8, "selection": 6, "holdout": 6}, "budget": {"trials": 6}, "dtype": "float32"}
    evomerge.search(content, run=tmp_path / "run", show=False)
    evomerge.Run(tmp_path / "run").export(tmp_path / "out", trial=5, show=False)
    base, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    changed = {tensor_role(n).component for n, tensor in merged.items() if not torch.equal(tensor, base[n])}
    assert {"vision", "projector"} <= changed
    (tmp_path / "looks.yaml").write_text(json.dumps(task))
    found = evomerge.evaluate(tmp_path / "out", tmp_path / "looks.yaml", allow_task_code=True, show=False)
    values = found.tasks["answer_prob"].raw["score"]
    assert len(set(values)) > 10, "the items differ only in their images"


def test_only_a_model_with_a_decoder_has_towers_beside_it() -> None:
    assert towers_beside_decoder(["model.visual.blocks.0.a.weight", "model.layers.0.mlp.up_proj.weight"]) == ["vision"]
    assert towers_beside_decoder(["vision_model.encoder.layers.0.a.weight", "text_model.encoder.layers.0.b.bias"]) == []


def test_keep_has_no_meaning_beside_slices_and_in_mergekit(tmp_path: Path) -> None:
    write_family(tmp_path)
    recipe, _ = read_merge(mean_of(tmp_path, keep=["mlp"]))
    with pytest.raises(EvomergeError, match="mergekit cannot leave components at the base; this recipe keeps mlp"):
        dump_mergekit(recipe)
    slices = [{"layers": {"one": [0, 2], "two": [0, 2]}}]
    with pytest.raises(EvomergeError, match="keep: has no meaning beside `slices`"):
        read_merge(mean_of(tmp_path, keep=["mlp"], slices=slices))


def test_a_component_that_the_models_do_not_have_is_told(tmp_path: Path) -> None:
    """The head of a tied model is its embedding: to keep it, that has to be named."""
    base, one = write_llama(tmp_path / "base", tied=True), write_llama(tmp_path / "one", 1, tied=True)
    for keep, told in (
        (["head"], ["keep: the models have no head of their own; it is their embedding, which is not kept"]),
        (["vision"], ["keep: the models have no vision of their own"]),
        (["head", "embedding"], []),
    ):
        source = RecipeSource(name="one", path=str(one))
        recipe = Recipe(method="linear", base=Model(path=str(base)), sources=[source], keep=keep)
        assert open_bank(recipe).models.compatibility.notes == told
