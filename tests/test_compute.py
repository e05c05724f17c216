"""What computes: the type is chosen by measured times alone, kept by the study, and holds the export's very values."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from searches import finished_search, run_cli, write_config
from test_export import ARCHITECTURES, bank_of, exported, recipe_for, same_bits, tensors_in, write_relatives

from evomerge.config.config_file import load_config
from evomerge.errors import EvomergeError
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.merge.compute_dtype import faster_type, measure
from evomerge.merge.live import candidate_model, destinations, load_live_model
from evomerge.merge.materialise import materialise
from evomerge.search.evaluation.race_policy import LOOKS
from evomerge.search.evaluation.score_checks import finite_scores
from evomerge.search.evaluation.settled_dtype import settle_compute_dtype
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.models import open_config_models
from evomerge.search.run import open_run
from evomerge.search.storage.item_scores import evaluation_key
from evomerge.search.storage.study import COMPUTE
from evomerge.search.storage.trial_record import record_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bfloat16", "chosen"),
    [(60.0, "float32"), (1.3, "float32"), (1.2, "bfloat16"), (1.0, "bfloat16"), (0.3, "bfloat16")],
)
def test_float32_computes_where_it_is_clearly_faster(bfloat16: float, chosen: str) -> None:
    assert faster_type("bfloat16", {"float32": 1.0, "bfloat16": bfloat16}) == chosen


def test_where_nothing_can_be_chosen_nothing_is_measured() -> None:
    assert measure("float32", "cpu", [(64, 64)]) == measure("bfloat16", "cuda", [(64, 64)]) == {}
    assert measure("bfloat16", "cpu", [(64,)]) == {}
    assert faster_type("float16", {}) == "float16"


def test_products_of_the_models_own_sizes_are_timed_in_both_types() -> None:
    found = measure("bfloat16", "cpu", [(48, 32), (48, 32), (8, 4096), (5,)])
    assert set(found) == {"float32", "bfloat16"}
    assert min(found.values()) > 0


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_a_live_model_in_float32_holds_the_values_of_the_bfloat16_export(
    kind: str, method: str, tmp_path: Path
) -> None:
    folders = write_relatives(tmp_path, ARCHITECTURES[kind])
    recipe, bank = recipe_for(folders, method), bank_of(folders)
    assert recipe.dtype == "bfloat16"
    live = candidate_model(bank, torch.bfloat16, torch.float32)
    assert {p.dtype for p in live.parameters()} == {torch.float32}
    places = destinations(live, bank)
    materialise(recipe, bank, places)
    written = tensors_in(exported(folders, recipe, tmp_path / "merged"))
    assert written.keys() == places.keys()
    for name, place in places.items():
        assert written[name].dtype == torch.bfloat16
        assert same_bits(written[name].float(), place.contiguous()), name


def test_a_model_that_is_not_widened_keeps_what_transformers_holds_in_float32(tmp_path: Path) -> None:
    folder = write_relatives(tmp_path, ARCHITECTURES["llama"])["base"]
    live = load_live_model(folder, torch.bfloat16, CPU, torch.bfloat16)
    assert {b.dtype for b in live.buffers() if b.is_floating_point()} == {torch.float32}


@pytest.fixture(scope="module")
def done(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search with values in bfloat16 that computes in float32, whatever this processor can."""
    changes: dict[str, Any] = {
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "budget": {"trials": 9},
        "racing": True,
        "splits": {"search": 24, "selection": 10, "holdout": 30},
    }
    return finished_search(write_config(tmp_path_factory.mktemp("computing"), tiny_family, **changes))


def test_the_study_the_trials_and_the_reports_say_what_computed(done: Path) -> None:
    study = open_run(done).study()
    assert study.user_attrs[COMPUTE]["dtype"] == "float32"
    assert {record_of(t).compute_dtype for t in study.trials} == {"float32"}
    assert json.loads((done / "state.json").read_text())["compute_dtype"] == "float32"
    assert "weights in bfloat16, computed in float32" in (done / "report.html").read_text()
    assert "weights in bfloat16, computed in float32" in run_cli("status", done).stdout


def test_a_trial_is_repeated_in_the_type_that_computed_it(done: Path) -> None:
    last = max(t.number for t in open_run(done).study().trials)
    again = run_cli("repeat", done, "--trial", str(last))
    assert again.returncode == 0, again.stdout + again.stderr


def test_on_the_search_split_base_and_parents_alone_are_scored_by_the_metric_too(done: Path) -> None:
    attributes = open_run(done).study().user_attrs
    kept = {split: [v for k, v in attributes.items() if k.startswith(evaluation_key(split, ""))] for split in
            ("search", "holdout")}  # fmt: skip
    by_both = {entry["name"] for entry in kept["search"] if all("exact_match" in m for m in entry["scores"].values())}
    assert by_both == {"base", "rev", "add"}
    assert len(kept["search"]) > len(by_both), "dare_ties is no point of this space"
    assert all("exact_match" in m for entry in kept["holdout"] for m in entry["scores"].values())


def test_where_races_look_is_kept_with_the_study(done: Path) -> None:
    looks = open_run(done).study().user_attrs[LOOKS]
    assert looks["ends"][-1] == 48
    assert looks["ends"] == sorted(set(looks["ends"]))
    assert looks["costs"] == sorted(looks["costs"])
    assert len(looks["ends"]) == len(looks["costs"])


def settled(study: optuna.Study, config: Any, **changes: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    found = settle_compute_dtype(
        study, config.model_copy(update=changes), open_config_models(config), "cpu", said.append
    )
    return found.compute_dtype, said


def test_a_study_keeps_the_type_it_began_with_and_says_what_is_faster_here(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.search.evaluation import settled_dtype

    config = load_config(write_config(tmp_path, tiny_family, dtype="bfloat16"))
    study = optuna.create_study()
    monkeypatch.setattr(settled_dtype, "measure", lambda *_: {"float32": 1.0, "bfloat16": 8.0})
    chosen, said = settled(study, config)
    assert (chosen, study.user_attrs[COMPUTE]["dtype"]) == ("float32", "float32")
    assert "8.0 times as long in bfloat16" in said[0]
    monkeypatch.setattr(settled_dtype, "measure", lambda *_: {"float32": 1.0, "bfloat16": 0.25})
    chosen, said = settled(study, config)
    assert chosen == "float32"
    assert "keeps to it" in said[0]
    assert "bfloat16 is faster" in said[0]
    chosen, said = settled(study, config, compute_dtype="bfloat16")
    assert (chosen, study.user_attrs[COMPUTE]["dtype"], len(said)) == ("bfloat16", "bfloat16", 1)
    began_before = optuna.create_study()
    began_before.add_trial(optuna.create_trial(value=0.0))
    monkeypatch.setattr(settled_dtype, "measure", lambda *_: {"float32": 1.0, "bfloat16": 8.0})
    assert settled(began_before, config)[0] == "bfloat16"


def test_a_type_that_cannot_hold_the_values_is_refused(tiny_family: Path, tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match="bfloat16 cannot hold the values of dtype float32"):
        load_config(write_config(tmp_path, tiny_family, compute_dtype="bfloat16"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e39])
def test_a_score_that_is_not_finite_breaks_the_candidate(wrong: float, tiny_family: Path, tmp_path: Path) -> None:
    (task, _) = open_task_set(load_config(write_config(tmp_path, tiny_family))).tasks
    assert finite_scores(task, "gold_logprob", {"gold_logprob": [-1.0, -2.0]}) == [-1.0, -2.0]
    with pytest.raises(NotFiniteScore, match="gold_logprob of an item is"):
        finite_scores(task, "gold_logprob", {"gold_logprob": [-1.0, wrong]})
