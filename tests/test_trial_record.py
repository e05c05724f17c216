"""What a study keeps of a finished trial: written, read back, and read from studies of before."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial

from evomerge.errors import EvomergeError
from evomerge.evaluate.signs import Signs
from evomerge.search.budget.usage import Elapsed, Usage
from evomerge.search.storage.compact import compact_scores, numbers_of
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.storage.item_scores import objective_scores, pack
from evomerge.search.storage.trial_record import (
    RECORD,
    EvaluationRecord,
    RaceRecord,
    Seconds,
    TrialRecord,
    record_of,
)

thousandths = st.integers(0, 10**9).map(lambda n: n / 1000)  # what `Usage` and `Elapsed` round to
counts = st.integers(0, 2**40)
seconds = st.builds(Seconds, *[st.none() | st.floats(0, 1e6)] * 8)
usages = st.builds(
    Usage, thousandths, thousandths, thousandths, counts, counts, counts, counts, st.none() | thousandths
)
elapsed = st.builds(Elapsed, thousandths, thousandths)
names = st.text(max_size=8)
packed = st.lists(st.floats(width=32), max_size=5).map(pack)
work = {
    "items": st.none() | names,
    "scores": st.dictionaries(names, st.dictionaries(names, packed, max_size=2), max_size=2),
    "seconds": seconds,
    "used": st.none() | usages,
    "elapsed": st.none() | elapsed,
}
trial_records = st.builds(
    TrialRecord,
    **work,
    signs=st.none() | st.builds(Signs, st.floats(0, 20), st.floats(0, 1)),
    partial=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    broken=st.none() | st.text(),
    reason=st.none() | st.text(),
    race=st.none() | st.just(RaceRecord(None)) | st.builds(RaceRecord, counts, st.lists(counts).map(tuple)),
    compute_dtype=st.none() | st.sampled_from(["float32", "bfloat16"]),
    order=st.none() | counts,
)
evaluation_records = st.builds(EvaluationRecord, **work, scored=counts)


@given(trial_records | evaluation_records)
def test_a_record_comes_back_from_its_json(record: TrialRecord | EvaluationRecord) -> None:
    content = record.to_json()
    assert content["version"] == 1
    text = json.dumps(content, allow_nan=False)
    assert type(record).from_json(json.loads(text)) == record


@given(trial_records)
def test_unknown_keys_are_ignored(record: TrialRecord) -> None:
    content = record.to_json() | {"later": {"x": [1]}}
    content["seconds"] = {**content.get("seconds", {}), "later": "x"}
    content["used"] = {**content.get("used", {}), "later": 1.0}
    found = TrialRecord.from_json(content)
    assert found.used == (record.used or Usage())
    assert (found.seconds, found.scores, found.race) == (record.seconds, record.scores, record.race)


# What evomerge wrote before records had a version: of a baseline, of a candidate that a race stopped, and of a broken
# one without a race.
BASELINE = """{"items": "b2d1b57fb89b7184", "scores": {"rev": {"gold_logprob":
    "eJwBMADP/wgQM7+0r7q/MAOdvnD/tb6Mt9S/YB3mv5zLzr9ITtC/QB4CwC43BMAAgLi+0It8v2qdGT0="}},
    "signs": [0.7099069529878241, 0.5], "compute_dtype": "float32", "seconds": {"merge": 0.0037313370012270752,
    "canary": 0.01097434199982672, "forward": 0.02482467699883273, "score": 0.0003738510022230912,
    "propose": 0.036124897000263445, "store": 0.0, "total": 0.08424261300024227}, "used": {"seconds": 0.0842,
    "worker_seconds": 0.0402, "device_seconds": 0.0402, "forwards": 2, "tokens": 245, "padded": 245,
    "peak_bytes": 637661184}, "elapsed": {"seconds": 7.052, "device_seconds": 7.052}, "order": 0}"""
STOPPED = """{"race": {"incumbent": 3, "others": [0, 1]}, "items": "b2d1b57fb89b7184", "scores": {},
    "signs": [0.7, 0.5], "partial": 0.25, "compute_dtype": "bfloat16", "seconds": {"race": 0.5, "total": 2.0},
    "used": {"joules": 12.5}, "elapsed": {"seconds": 9.5, "device_seconds": 19.0}, "order": 7}"""
BROKEN = """{"race": null, "broken": "a logit is not finite", "compute_dtype": "float32",
    "seconds": {"propose": 0.5, "store": 0.25, "total": 1.0}, "used": {}, "elapsed": {"seconds": 1.0}, "order": 8}"""


def test_a_record_of_before_versions_is_read() -> None:
    assert TrialRecord.from_json(json.loads(STOPPED)) == TrialRecord(
        items="b2d1b57fb89b7184",
        signs=Signs(0.7, 0.5),
        partial=0.25,
        race=RaceRecord(3, (0, 1)),
        compute_dtype="bfloat16",
        seconds=Seconds(race=0.5, total=2.0),
        used=Usage(joules=12.5),
        elapsed=Elapsed(9.5, 19.0),
        order=7,
    )
    baseline = create_trial(value=-1.0, user_attrs={RECORD: json.loads(BASELINE)})
    record = record_of(baseline)
    assert (record.in_full, record.raced, record.race, record.order) == (True, False, None, 0)
    assert record.seconds.canary == 0.01097434199982672
    assert record.used is not None
    assert record.used.peak_bytes == 637661184
    assert objective_scores(baseline)["rev"][0] == pytest.approx(-0.69946337)
    broken = TrialRecord.from_json(json.loads(BROKEN))
    assert (broken.in_full, broken.raced, broken.failure) == (False, False, "a logit is not finite")
    assert TrialRecord.from_json({}) == TrialRecord()


@pytest.mark.parametrize("text", [BASELINE, BROKEN])
def test_what_is_written_has_the_keys_and_values_of_before(text: str) -> None:
    """A study may be gone on with by an older evomerge, which knows no version."""
    content = json.loads(text)
    rewritten = TrialRecord.from_json(content).to_json()
    assert rewritten.pop("version") == 1
    for key in ("used", "elapsed"):  # numbers that are zero may have been left out
        assert {k: v for k, v in rewritten.pop(key).items() if v} == content.pop(key)
    assert rewritten == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1], "it is not an object"),
        ({"order": "7"}, "'order' is not a whole number"),
        ({"order": 1.5}, "'order' is not a whole number"),
        ({"partial": True}, "'partial' is not a number"),
        ({"broken": ["x"]}, "'broken' is not a text"),
        ({"signs": [1.0]}, "'signs' is not a list of two numbers"),
        ({"scores": {"task": "text"}}, "'scores' is not an object of texts by task and metric"),
        ({"race": {"incumbent": None, "others": []}}, "'race' is not an object of trial numbers"),
        ({"seconds": {"total": "1"}}, "'seconds' is not an object of numbers"),
        ({"elapsed": 3}, "'elapsed' is not an object"),
        ({"version": 2}, "a record of version 2; this evomerge reads up to 1"),
    ],
)
def test_a_damaged_record_is_one_message_with_the_trial_and_the_key(content: Any, said: str) -> None:
    with pytest.raises(EvomergeError, match=f"^trial -1: the study holds .*{said}"):
        record_of(create_trial(value=0.0, user_attrs={RECORD: content}))


def test_a_trials_record_is_read_once() -> None:
    trial = create_trial(value=0.0, user_attrs={RECORD: TrialRecord(order=3).to_json()})
    first = record_of(trial)
    assert first.order == 3
    assert record_of(trial) is first


@given(work["scores"])
def test_compact_scores_read_as_what_they_were_made_of(scores: dict[str, dict[str, str]]) -> None:
    found = compact_scores(scores)
    assert dict(found) == scores
    assert found == scores
    assert [*found] == [*scores]
    assert all(found[task] == metrics and [*found[task]] == [*metrics] for task, metrics in scores.items())
    assert compact_scores(found) is found


def test_texts_that_nobody_packs_are_kept_as_they_are() -> None:
    scores = {"a": {"x": "one two", "y": ""}}
    assert compact_scores(scores) is scores


@given(st.dictionaries(names, st.floats(allow_nan=False), min_size=1))
def test_parameters_in_an_array_read_as_a_dict(point: dict[str, float]) -> None:
    axes = {name: FloatDistribution(-1.0, 1.0) for name in point}
    found = numbers_of(axes, point.values())
    assert found == point
    assert point == found
    assert dict(found) == point
    assert point.keys() <= found.keys()
    assert list(found.items()) == list(point.items())
    copied = copy.deepcopy(found)
    assert type(copied) is dict
    assert copied == point
    assert numbers_of(axes | {"choice": CategoricalDistribution(["a"])}, [*point.values(), 0.0]) is None


def test_trials_share_names_and_do_not_share_scores(tmp_path: Path) -> None:
    """Of two trials that a study reads, everything that is the same is there once."""
    study = open_study(sqlite_url(tmp_path / "s.db"), "s", create=True)
    axes = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}
    for k in range(2):
        record = TrialRecord(items="0" * 16, scores={"task": {"acc": pack([k])}}, compute_dtype="float32")
        point = {"x": 0.25 * k, "y": 0.5}
        attributes = {RECORD: record.to_json()}
        study.add_trial(create_trial(params=point, distributions=dict(axes), value=float(k), user_attrs=attributes))
    first, second = study.get_trials(deepcopy=False)
    assert first.distributions is second.distributions
    assert first.params == {"x": 0.0, "y": 0.5}
    assert second.params == {"x": 0.25, "y": 0.5}
    one, other = record_of(first), record_of(second)
    assert one.items is other.items
    assert one.compute_dtype is other.compute_dtype
    assert next(iter(one.scores)) is next(iter(other.scores))
    assert one.scores != other.scores
    assert other.scores == {"task": {"acc": pack([1.0])}}
