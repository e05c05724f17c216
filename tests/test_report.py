"""report.html: complete, small, without network, in Chromium on a wide and a narrow screen, in light and dark."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import look
from optuna.trial import create_trial
from searches import finished_search, run_cli, verdict_of, write_config

from evomerge.evaluate.answers import Answer
from evomerge.report.page import PageSoFar, write_report
from evomerge.report.page.answers import changes, digest_of
from evomerge.report.page.importance import by_group, path_gains
from evomerge.report.page.material import gather
from evomerge.report.page.page import page
from evomerge.report.page.svg import Frame, line, tick_texts, ticks
from evomerge.report.page.winner import heat_table
from evomerge.search.budget.usage import Elapsed
from evomerge.search.run import Run, open_run
from evomerge.search.storage.answers import LONGEST, keep_answers, read_answers, read_items
from evomerge.search.storage.step_record import StepRecord
from evomerge.search.storage.trial_record import TrialRecord
from evomerge.search.verdict.conflicts import read_conflicts
from evomerge.search.verdict.landscape import SHARES, read_landscape

MOST_BYTES = 1_500_000
SKILLS = ("rev", "sort", "count", "add")


@pytest.fixture(scope="module")
def run(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search with a learned start, trials, races and a front, and its landscape."""
    folder = tmp_path_factory.mktemp("report")
    tasks = [{"task": f"evals/tiny/{skill}.yaml"} for skill in ("rev", "add")]
    root = Path(__file__).resolve().parent.parent
    config = write_config(
        folder,
        tiny_family,
        tasks=[{"task": str(root / t["task"])} for t in tasks],
        sampler={"name": "auto", "steps": 12},
        goals="pareto",
        budget={"trials": 14},
    )
    found = finished_search(config)
    assert run_cli("report", found, "--landscape").returncode == 0
    return found


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Run:
    return Run(shutil.copytree(run, tmp_path / "run"))


def test_the_page_is_sound_in_a_browser(run: Path, tmp_path: Path) -> None:
    assert look((run / "report.html").as_uri(), pictures=tmp_path) == []


def test_the_page_has_every_section_and_is_small(run: Path) -> None:
    page = (run / "report.html").read_text()
    names = re.findall(r"<section id=(\w+)", page)
    assert names == "verdict scores answers progress winner importance landscape conflicts front cost use".split()
    assert len(page.encode()) < MOST_BYTES / 10
    assert not re.search(r"(src|href)=['\"]?https?:", page), "the page must need no network"


def test_the_page_of_a_long_search_stays_small(run: Path) -> None:
    material = gather(open_run(run))
    rng = np.random.default_rng(0)
    records = [TrialRecord(elapsed=Elapsed(10.0 * k), partial=0.3 if k % 3 else None) for k in range(20_000)]
    many = [
        create_trial(value=float(v), user_attrs={"record": record})
        for v, record in zip(rng.random(20_000), records, strict=True)
    ]
    for number, trial in enumerate(many):
        trial.number = number
    whole = page(replace(material, status=replace(material.status, trials=many)))
    assert 200_000 < len(whole) < MOST_BYTES / 2  # what is left is for answers, of which there are few here


def test_a_table_of_many_layers_and_sources_shows_every_so_many_layers() -> None:
    rows = {f"source {k}": [0.01 * layer for layer in range(80)] for k in range(200)}
    table = heat_table(rows)
    assert 3000 < table.count("<td class=") <= 4000
    assert "<th>4</th><th>8</th>" in table
    assert "<th>1</th>" in heat_table({"source": [0.1, 0.2]})


def test_the_answers_are_filtered_and_searched_in_the_page(run: Path) -> None:
    def act(page: Any) -> None:
        counts = {}
        for kind in ("gained", "lost", ""):
            page.select_option("select[aria-label='kind of change']", kind)
            counts[kind] = page.locator(".item:visible").count()
        assert counts["gained"] + counts["lost"] == counts[""] > 0
        page.fill("input[type=search]", "no answer has these words")
        assert page.locator(".item:visible").count() == 0
        assert page.inner_text(".shown").startswith("0 of ")
        page.fill("input[type=search]", "")
        page.locator(".copy").first.click()
        page.wait_for_function("document.querySelector('.copy').textContent === 'Copied'", timeout=5000)

    assert look((run / "report.html").as_uri(), act=act) == []


def test_what_changed_is_what_the_stored_scores_and_answers_say(run: Path) -> None:
    material = gather(open_run(run))
    verdict = verdict_of(run)
    parent = next(c["name"] for c in verdict["comparisons"] if c["kind"] == "parent")
    own, other = verdict["chosen"]["recipe"], digest_of(material, parent)
    found = changes(material, own, other)
    items = read_items(run / "answers").tasks
    answers = {digest: read_answers(run / "answers", digest).tasks for digest in (own, other)}
    for task, judged in verdict["tasks"].items():
        gap = sum(c.after - c.before for c in found if c.task == task) / judged["items"]["holdout"]
        means = (verdict["holdout"][name][task]["value"] for name in ("winner", parent))
        assert gap == pytest.approx(np.subtract(*means))
        assert len(items[task]) == judged["items"]["holdout"]
    for each in found:  # exact match: right is what the filter took of the answer
        gold = items[each.task][each.item].gold
        for digest, score in ((own, each.after), (other, each.before)):
            assert (answers[digest][each.task][each.item].taken.strip() == gold.strip()) == (score == 1.0)


def test_answers_are_added_to_those_that_are_kept_whatever_their_characters(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    odd = Answer("prompt \ud800 </script>", "gold", "text\x00", "taken", False)
    keep_answers(folder, "d1", "one", {"task": ["a"]}, {"task": [odd]})
    keep_answers(folder, "d1", "one", {"task": ["b"]}, {"task": [replace(odd, text="later", prompt="x" * 9000)]})
    assert read_items(folder).tasks["task"]["a"].prompt == "prompt ? </script>"
    assert len(read_items(folder).tasks["task"]["b"].prompt) == LONGEST
    assert {item: said.text for item, said in read_answers(folder, "d1").tasks["task"].items()} == {
        "a": "text\x00",
        "b": "later",
    }
    assert read_answers(folder, "unknown").tasks == {}


def test_a_damaged_or_missing_file_of_answers_costs_a_section_not_the_report(copied: Run) -> None:
    (copied.answers_folder / "items.json").write_text('{"tasks": 3}')
    write_report(copied)
    assert "They cannot be read" in copied.report_file.read_text()
    shutil.rmtree(copied.answers_folder)
    write_report(copied)
    assert "an earlier version made this run" in copied.report_file.read_text()


def test_the_landscape_begins_at_the_candidate_and_goes_on_where_it_stopped(copied: Run) -> None:
    found = read_landscape(copied)
    assert found is not None
    assert found.lines.keys() == {"base", "rev", "add"}
    assert all(line.keys() == {0.0, *SHARES} for line in found.lines.values())
    assert len({line[0.0] for line in found.lines.values()}) == 1
    known = found.lines["add"].pop(0.5)
    copied.landscape_file.write_text(found.model_dump_json())
    assert run_cli("report", copied.folder, "--landscape").returncode == 0
    again = read_landscape(copied)
    assert again is not None
    assert again.lines["add"][0.5] == known
    log = copied.log_file.read_text()
    assert log.count("points on the line to") == 4, "three lines at first, one point afterwards"


def test_conflicts_of_the_sources_are_measured_at_the_end(run: Path) -> None:
    found = read_conflicts(Run(run))
    assert found is not None
    assert found.layers == [0, 2, 3]
    assert found.cosines["rev"]["rev"] == pytest.approx(1.0)
    assert [(pair.one, pair.other) for pair in found.signs] == [("rev", "add")]
    assert all(share is None or 0 <= share <= 1 for share in found.signs[0].shares.values())
    assert f"{found.cosines['rev']['add']:.3f}" in (run / "report.html").read_text()


@pytest.mark.parametrize("outcome", ["better", "no difference shown", "worse", "too little searched"])
def test_each_outcome_has_its_reason_and_next_command_on_the_page_and_in_the_terminal(
    copied: Run, outcome: str
) -> None:
    verdict = verdict_of(copied.folder)
    command = (
        "evomerge export RUN --out merged/" if outcome in ("better", "worse") else "evomerge resume RUN --trials 99"
    )
    same = verdict["comparisons"][0]
    same |= {"same": True, "difference": {"value": 0.0, "low": 0.0, "high": 0.0}}
    verdict |= {"outcome": outcome, "winner": outcome == "better", "sentence": f"{outcome}: why.", "next": command}
    copied.verdict_file.write_text(json.dumps(verdict))
    write_report(copied)
    page = copied.report_file.read_text()
    shown = " ".join(run_cli("status", copied.folder).stdout.split())
    for text in (page, shown):
        assert command.replace("RUN", str(copied.folder)) in text
        # A narrow table breaks the cell into lines.
        assert re.search(r"the same\b.*?\bscore\b.*?\bon\b.*?\bevery\b.*?\bitem", text)
        assert "+0.000 [+0.000, +0.000]" not in text
    assert "<p class=why>Why.</p>" in page


def test_a_verdict_of_an_earlier_version_is_shown_with_its_present_outcome(copied: Run) -> None:
    verdict = verdict_of(copied.folder)
    for key in ("next", "simplified"):
        del verdict[key]
    for comparison in verdict["comparisons"]:
        del comparison["same"]
    for before, now in {"guard not kept": "worse", "nothing better found": "worse"}.items():
        copied.verdict_file.write_text(json.dumps(verdict | {"outcome": before}))
        found = copied.verdict()
        assert found is not None
        assert found["outcome"] == now
        write_report(copied)


def test_a_run_without_a_verdict_has_a_page_so_far_that_reloads_itself(copied: Run, tmp_path: Path) -> None:
    copied.verdict_file.unlink()
    copied.winner_file.unlink()
    assert run_cli("report", copied.folder).returncode == 0
    page = copied.report_file.read_text()
    assert "there is no verdict yet" in page
    assert "http-equiv=refresh" in page
    assert re.findall(r"<section id=(\w+)", page) == ["verdict", "progress", "importance", "conflicts", "front", "cost"]
    assert look(copied.report_file.as_uri()) == []


def test_a_page_is_written_when_it_is_due_and_an_error_only_logged(copied: Run) -> None:
    now = [0.0]
    pages = PageSoFar(copied, lambda: now[0])
    copied.report_file.unlink()
    pages.refresh()
    assert not copied.report_file.exists()
    now[0] = 61.0
    pages.refresh()
    assert copied.report_file.exists()
    copied.verdict_file.write_text("{")
    now[0] = 200.0
    pages.refresh()
    assert "report.html cannot be written now" in copied.log_file.read_text()


def test_names_are_shown_as_text_not_as_html(copied: Run) -> None:
    verdict = verdict_of(copied.folder)
    verdict["sentence"] = "Better: <script>alert(1)</script>"
    verdict["comparisons"][0]["name"] = "<b onclick=x>"
    verdict["holdout"]["<b onclick=x>"] = verdict["holdout"]["winner"]
    copied.verdict_file.write_text(json.dumps(verdict))
    write_report(copied)
    page = copied.report_file.read_text()
    assert "<script>alert" not in page
    assert "<b onclick" not in page


def test_gains_along_the_way_add_up_to_the_rise_of_a_smooth_value() -> None:
    """value = -(x - 1)^2 - 4 (y - 2)^2, from (0, 0) to (1, 2) in many steps: 1 + 16 in all."""
    points = [(t, 2 * t) for t in np.linspace(0, 1, 2001)]
    climb = [
        StepRecord(
            {"weight.a.layer0": x, "weight.b": y}, {"weight.a.layer0": -2 * (x - 1), "weight.b": -8 * (y - 2)}, 0, 1
        )
        for x, y in points
    ]
    gains = path_gains(climb)
    assert gains["weight.a.layer0"] == pytest.approx(1, rel=1e-3)
    assert gains["weight.b"] == pytest.approx(16, rel=1e-3)
    assert by_group(gains) == {"a": {0: gains["weight.a.layer0"]}, "b": {0: gains["weight.b"]}}


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.8), (0, 1234), (1e-6, 3e-6), (0.5, 40.5), (0.997, 0.9981)])
def test_ticks_are_round_within_the_axis_and_distinct(low: float, high: float) -> None:
    for count in (3, 5, 9):
        found = ticks(low, high, count)
        assert 2 <= len(found) <= 2 * count
        assert all(low - 1e-12 <= x <= high + 1e-12 for x in found)
        assert len(set(tick_texts(found))) == len(found)


def test_a_line_goes_through_its_points() -> None:
    frame = Frame(400, 200, (0.0, 10.0), (0.0, 1.0))
    path = re.findall(r"[\d.]+ [\d.]+", line(frame, [0.0, 10.0], [0.0, 1.0], "a"))
    assert path == [f"{frame.left:.1f} {200 - 38:.1f}", f"{400 - 14:.1f} 22.0"]
