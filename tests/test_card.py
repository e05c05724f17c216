"""The model card: what one can do with the model, where it comes from, and what the licences ask for."""

import re
from pathlib import Path

import pytest
import yaml
from badfiles import INTERVAL, VERDICT
from models import write_family

from evomerge.merge.output.licences import NOT_STATED, licence, licence_of_merge, licence_warnings
from evomerge.merge.output.model_card import hub_id, model_card, shown
from evomerge.merge.recipe.recipe import Recipe, parse_recipe
from evomerge.report.verdict_text import candidate_title, copied_model, results_section


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    return write_family(tmp_path, ("one", "two"))


def linear(family: dict[str, Path]) -> Recipe:
    sources = [{"name": n, "path": str(family[n]), "parameters": {"weight": 0.5}} for n in ("one", "two")]
    content = {"method": "linear", "base": {"path": str(family["base"])}, "sources": sources}
    return parse_recipe(content, Path("recipe"))


def head(card: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


def state(folder: Path, licence: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")


def test_a_card_has_tags_usage_and_recipe_and_no_path_of_this_machine(family: dict[str, Path]) -> None:
    for folder in family.values():
        state(folder, "mit")
    card = model_card(linear(family), "## Result\n\nBetter.\n")
    assert head(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "evomerge"],
        "license": "mit",
    }
    assert "# A merge of 2 models by `linear`" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "method: linear" in card.split("```yaml")[1]
    assert str(family["base"].parent) not in card
    assert "Licences" not in card


def test_models_of_the_hub_are_named_in_the_front_matter(
    monkeypatch: pytest.MonkeyPatch, family: dict[str, Path]
) -> None:
    import evomerge.merge.output.model_card as module

    ids = {"owner/base@0123": family["base"], "owner/one": family["one"], "owner/two": family["two"]}
    monkeypatch.setattr(module, "locate", ids.__getitem__)
    recipe = linear(family)
    recipe.base.path, recipe.sources[0].path, recipe.sources[1].path = ids
    assert head(model_card(recipe))["base_model"] == ["owner/base", "owner/one", "owner/two"]


def test_a_model_in_the_hubs_cache_is_known_by_its_id() -> None:
    cached = "/home/me/.cache/huggingface/hub/models--owner--a-model/snapshots/0123abc"
    assert hub_id(cached) == shown(cached) == "owner/a-model"
    assert (hub_id("/home/me/tuned"), shown("/home/me/tuned")) == (None, "tuned")
    assert shown("owner/name@0123") == "owner/name@0123"


def test_a_copy_is_called_one(family: dict[str, Path]) -> None:
    assert "# A copy of `one`" in model_card(linear(family), copy_of="one")


@pytest.mark.parametrize(
    ("stated", "of_merge", "words"),
    [
        (["mit", "mit"], "mit", []),
        (["apache-2.0", "mit"], "other", []),
        (["apache-2.0", "llama3"], "llama3", []),
        (["gemma", "llama3"], "other", ["different terms"]),
        (["apache-2.0", NOT_STATED], "other", ["no licence is stated"]),
        (["gpl-3.0", "llama3"], "other", ["do not fit together"]),
        (["gpl-3.0", "apache-2.0"], "gpl-3.0", []),
        (["gpl-3.0", "cc-by-sa-4.0"], "other", ["do not fit together"]),
        (["cc-by-nc-4.0", "mit"], "cc-by-nc-4.0", ["commercially"]),
        (["cc-by-nd-4.0", "mit"], "cc-by-nd-4.0", ["must not be published"]),
    ],
)
def test_licences_that_do_not_fit_are_told(stated: list[str], of_merge: str, words: list[str]) -> None:
    licences = {f"model {k}": text for k, text in enumerate(stated)}
    assert licence_of_merge(licences) == of_merge
    found = licence_warnings(licences)
    assert len(found) == len(words)
    for line, word in zip(found, words, strict=True):
        assert word in line
        assert "model " in line


def test_a_warning_of_licences_is_in_the_card(family: dict[str, Path]) -> None:
    for folder, text in zip(family.values(), ("mit", "gpl-3.0", "llama3"), strict=True):
        state(folder, text)
    assert "> **Licences:** one (gpl-3.0), two (llama3) do not fit together" in model_card(linear(family))


def test_a_licence_called_other_is_known_by_its_name() -> None:
    assert licence({"license": "other", "license_name": "tuned-terms"}) == "tuned-terms"
    assert licence({}) == NOT_STATED


def test_the_results_of_a_recommended_parent_say_that_it_is_a_copy() -> None:
    span = {"value": 0.5, "low": 0.4, "high": 0.6}
    verdict = {
        "winner": False, "recommended": "upper", "sentence": "Worse than upper: why.", "score": span,
        "comparisons": [{"name": "base", "kind": "base", "score": 0.4, "difference": span, "same": True}],
        "chosen": {"name": "upper"}, "finalists": [{"name": "upper", "kind": "parent"}], "holdout_uses": 1,
        "holdout": {name: {"task": span} for name in ("winner", "base")}, "detectable": None,
        "tasks": {"task": {"metric": "acc", "items": {"holdout": 9}}},
    }  # fmt: skip
    assert copied_model(verdict) == candidate_title(verdict) == "upper"
    text = results_section(verdict)
    assert "a copy of `upper`" in text
    assert "| base | 0.400 | the same score on every item |" in text


ODD = "x`|<b>\n---\nlicense: evil\n```\n# Run this\n[a](http://b)\n\x1b[2J"


def test_no_text_of_others_leaves_its_place_in_a_card(family: dict[str, Path]) -> None:
    for folder in family.values():
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'license': ODD.replace('---', '- -')})}---\n")
    recipe = linear(family)
    for source in recipe.sources:
        source.name += ODD
    recipe.chat_template = ODD
    tasks = {ODD: VERDICT["tasks"]["task"]}  # type: ignore[index]
    holdout = {"winner": {ODD: INTERVAL}, ODD: {ODD: INTERVAL}}
    comparisons = [{**VERDICT["comparisons"][0], "name": ODD}]  # type: ignore[index]
    verdict = VERDICT | {"tasks": tasks, "holdout": holdout, "comparisons": comparisons, "sentence": ODD}
    for copied in (None, ODD):
        card = model_card(recipe, results_section(verdict | {"recommended": copied or "winner"}), copied)
        assert head(card) == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["mergekit", "merge", "evomerge"],
            "license": "other",
        }
        lines = card.split("\n")
        fence = next(line for line in lines if line.startswith("````"))
        outside = lines[: lines.index(fence)]
        assert lines[lines.index(fence) + 1 :].count(fence.removesuffix("yaml")) == 1
        headings = [line for line in outside if line.startswith("#")]
        assert headings[1:] == ["## Use", "## Result", "## Models", "## Make it again"]
        text = re.sub(r"`[^`\n]*`", "", re.sub(r"\\\\.", "", "\n".join(outside)))
        assert outside.count("```") == 1
        assert [piece for piece in ("<b>", "](", "\x1b") if piece in text] == []
        columns = {line.replace("\\|", "").count("|") for line in outside if line.startswith("|")}
        assert columns == {5, 4}
