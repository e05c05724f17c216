"""How the search got there: values over trials and over time, the metric, gradient steps, how trials ended."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from optuna.trial import FrozenTrial, TrialState

from evomerge.report.gradient_steps import SMOOTHED, curves, running_mean, steps_text
from evomerge.report.page.material import Material
from evomerge.report.page.parts import capital, section, text
from evomerge.report.page.svg import Frame, Range, chart, corners, legend, level, line, points, range_of, thinned
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.storage.study import in_full
from evomerge.search.storage.trial_record import place_in_order, record_of

TIMES = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class Tried:
    """A finished trial with a value.

    place: its place in the order in which trials finished, from 1.
    name: the baseline's, empty for a trial of the sampler.
    full: whether it was scored on all items.
    seconds: how long the run had taken; None in old runs.
    """

    place: int
    number: int
    value: float
    name: str
    full: bool
    seconds: float | None


def progress_section(material: Material) -> str:
    """Charts of the search; empty before the first trial."""
    tried = tried_trials(material)
    if not tried:
        return ""
    ordered = sorted(t.value for t in tried)
    ys = range_of([ordered[len(ordered) // 10], ordered[-1]])  # broken candidates would press all others together
    content = [values_chart(material, tried, ys)]
    if (timed := [t for t in tried if t.seconds is not None and t.full])[1:]:
        content.append(time_chart(material, timed, ys))
    content += [metric_chart(material, {t.number: t.place for t in tried}), steps_chart(material), endings(material)]
    return section("progress", "How the search got there", *content)


def tried_trials(material: Material) -> list[Tried]:
    """The finished trials with a value, in the order in which they finished."""
    complete = [t for t in material.status.trials if t.state == TrialState.COMPLETE and t.value is not None]
    complete.sort(key=lambda t: (place_in_order(t), t.number))
    return [
        Tried(
            place,
            t.number,
            float(t.value or 0.0),
            material.status.baselines.get(t.number, ""),
            in_full(t),
            seconds_of(t),
        )
        for place, t in enumerate(complete, 1)
    ]


def seconds_of(trial: FrozenTrial) -> float | None:
    """How long the run had taken when a trial ended."""
    elapsed = record_of(trial).elapsed
    return None if elapsed is None else elapsed.seconds


def best_so_far(values: Sequence[float]) -> list[float]:
    """The highest of each value and those before it."""
    found, best = [], -math.inf
    for value in values:
        best = max(best, value)
        found.append(best)
    return found


def values_chart(material: Material, tried: Sequence[Tried], ys: Range) -> str:
    """The value of every trial, and the best so far.  ys: the values that are shown."""
    full = [t for t in tried if t.full]
    best = best_so_far([t.value for t in full])

    def draw(width: int) -> str:
        frame = Frame(width, 300, (0.5, tried[-1].place + 0.5), ys, "finished trials", material.value_title, whole=True)
        kinds = (
            ("g", thinned([t for t in tried if t.full and not t.name]), 3.0),
            ("f", thinned([t for t in tried if not t.full and not t.name]), 2.4),
            ("b", [t for t in tried if t.name], 4.5),
        )
        parts = [
            points(frame, [t.place for t in some], [t.value for t in some], kind, list(map(title_of, some)), radius)
            for kind, some, radius in kinds
        ]
        way = corners([t.place for t in full] + [tried[-1].place], best + best[-1:])
        steps = line(frame, *way, "a", steps=True)
        return frame.draw(steps, *parts, label="The value of every trial, and the best so far")

    marks = [("a", "best so far"), ("g", "trial")]
    marks += [("f", "stopped early (estimate)")] * any(not t.full for t in tried)
    marks += [("b", "baseline")] * any(t.name for t in tried)
    below = "Lower values stand at the lower edge." if any(t.value < ys[0] for t in tried) else ""
    return f"<h3>Best value over trials</h3>{legend(*marks)}{chart(draw)}" + (text(below, "dim") if below else "")


def title_of(trial: Tried) -> str:
    """What a trial's circle says."""
    early = "" if trial.full else " (stopped early)"
    return f"{trial.name or f'trial {trial.number}'}: {trial.value:.4f}{early}"


def time_chart(material: Material, timed: Sequence[Tried], ys: Range) -> str:
    """The best value so far over the time of the run.  ys: the values that are shown."""
    longest = max(t.seconds or 0.0 for t in timed)
    unit, name = next((u, n) for u, n in TIMES if longest >= 2 * u or u == 1.0)
    xs, best = [(t.seconds or 0.0) / unit for t in timed], best_so_far([t.value for t in timed])

    def draw(width: int) -> str:
        frame = Frame(width, 220, (0.0, longest / unit), ys, f"{name} of the run", material.value_title)
        return frame.draw(line(frame, *corners(xs, best), "a", steps=True), label="The best value over time")

    return f"<h3>Best value over time</h3>{chart(draw)}"


def metric_chart(material: Material, places: Mapping[int, int]) -> str:
    """The metric of all models that were scored by it on the search split; empty for fewer than three trials.

    places: trial number -> its place in the order in which trials finished.
    """
    if SCALE not in material.attributes:
        return ""
    scale = Scale.from_json(material.attributes[SCALE])
    found = [(m, both[1]) for m in material.status.models if (both := m.means(scale, list(scale.tasks))) is not None]
    trials = sorted((places[m.trial], value, m.name) for m, value in found if m.trial is not None)
    means = {model.name: value for model, value in found}
    if len(trials) < 3:
        return ""
    parents = {name: means[name] for name in (s.name for s in material.status.config.sources) if name in means}
    levels = [("b", f"best parent, {max(parents, key=parents.__getitem__)}", max(parents.values()))] if parents else []
    levels += [("f", "base", means["base"])] if "base" in means else []
    xs, ys = [float(t[0]) for t in trials], [t[1] for t in trials]

    def draw(width: int) -> str:
        whole = range_of([*ys, *(value for _, _, value in levels)])
        frame = Frame(
            width, 240, (0.5, xs[-1] + 0.5), whole, "finished trials", "mean metric on the search items", whole=True
        )
        shown = thinned(trials)
        titles = [f"{name}: {value:.3f}" for _, value, name in shown]
        dots = points(frame, [place for place, _, _ in shown], [value for _, value, _ in shown], "g", titles)
        lines = [level(frame, value, kind) for kind, _, value in levels]
        best = line(frame, *corners(xs, best_so_far(ys)), "d", steps=True)
        return frame.draw(*lines, dots, best, label="The metric of the trials")

    marks = legend(("d", "best so far"), ("g", "trial"), *((kind, words) for kind, words, _ in levels))
    return f"<h3>By the metric</h3>{marks}{chart(draw)}"


def steps_chart(material: Material) -> str:
    """The gradient steps of the learned start; empty without one."""
    climbs = material.status.climbs
    if not climbs:
        return ""
    values = [step.value for climb in climbs for step in climb]

    def draw(width: int) -> str:
        title = f"mini-batch, {material.value_title}" if width > 500 else "value of a mini-batch"
        frame = Frame(width, 220, (0.5, len(values) + 0.5), range_of(values), "gradient step", title, whole=True)
        dots = [points(frame, xs, ys, "g", titles_of(xs, ys), 2.4) for xs, ys in curves(climbs)]
        lines = [line(frame, xs, running_mean(ys), "a") for xs, ys in curves(climbs)]
        return frame.draw(*dots, *lines, label="The value of each gradient step's mini-batch")

    marks = legend(("a", f"mean of {SMOOTHED} steps"), ("g", "mini-batch"))
    words = text(f"{capital(steps_text(climbs, material.status.used))}.", "dim")
    return f"<h3>Learned start</h3>{marks}{chart(draw)}{words}"


def titles_of(steps: Sequence[int], values: Sequence[float]) -> list[str]:
    """What the circles of gradient steps say."""
    return [f"step {step}: {value:.4f}" for step, value in zip(steps, values, strict=True)]


def endings(material: Material) -> str:
    """How the trials ended, as shares of a bar."""
    status = material.status
    records = [record_of(t) for t in status.trials]
    broken = sum(record.broken is not None for record in records)
    early, failed = len(status.shares), status.count(TrialState.FAIL)
    running = status.count(TrialState.RUNNING)
    counts = [
        ("a", "scored in full", status.finished - early - broken - failed),
        ("f", "stopped early, because a race showed that they are worse than the best", early),
        ("b", "broken", broken),
        ("e", "failed", failed),
        ("g", "running or interrupted", running),
    ]
    there = [(kind, words, count) for kind, words, count in counts if count]
    bar = "".join(f"<i class={kind} style='flex:{count}' title='{escape(words)}'></i>" for kind, words, count in there)
    marks = legend(*((kind, f"{count} {words}") for kind, words, count in there))
    saved = text(f"So {status.evaluated:.0%} of all items were scored.", "dim") if early else ""
    return f"<h3>How trials ended</h3><div class=shares>{bar}</div>{marks}{saved}"
