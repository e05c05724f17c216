"""report.html: the verdict, the table of scores, a plot of the trials, the coefficients.  One file, no network."""

import html
import importlib.metadata
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from evomerge.files import write_text
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.coefficients import filtered_values
from evomerge.merge.recipe.recipe import Recipe, load_recipe
from evomerge.report.gradient_steps import steps_figure, steps_text
from evomerge.report.status import Status, read_status
from evomerge.report.usage_text import usage_text
from evomerge.report.verdict_text import interval_text, remarks
from evomerge.search.run import Run
from evomerge.search.storage.study import in_full
from evomerge.search.verdict.front import Front
from evomerge.sources.locate import locate
from evomerge.sources.safetensors_files import stored_tensor_names
from evomerge.sources.tensor_names import PARTS, Component, Part, TensorRole, layer_count

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2.2rem}
.verdict{padding:1rem 1.2rem;border-radius:.5rem;font-size:1.1rem}
.yes{background:#e2f4e8;border-left:.4rem solid #2b8a4b}.no{background:#fdf1dc;border-left:.4rem solid #c47f0a}
table{border-collapse:collapse;width:100%} th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #dde3e8}
th:first-child,td:first-child{text-align:left} tr.candidate{font-weight:600;background:#f3f7fb}
small,.dim{color:#67747f} td small{display:block}
"""
SHOWN: tuple[tuple[Component, Part | None], ...] = (
    ("attention", None), ("attention", "attention.q"), ("attention", "attention.k"), ("attention", "attention.v"),
    ("attention", "attention.o"), ("mlp", None), ("mlp", "mlp.gate"), ("mlp", "mlp.up"), ("mlp", "mlp.down"),
    ("norm", None),
)  # fmt: skip
RED_TO_BLUE = [  # ColorBrewer's RdBu; the scale that Plotly's JavaScript has under this name is another one
    [i / 10, f"#{colour}"]
    for i, colour in enumerate("67001f b2182b d6604d f4a582 fddbc7 f7f7f7 d1e5f0 92c5de 4393c3 2166ac 053061".split())
]
VALUE_TITLE = {False: "value on the search items", True: "value on the search items (0: base, 1: best parent)"}
PALETTE = {"parent": "#8a97a3", "uniform": "#c47f0a", "recommended": "#7a5bb5"}


Figure = dict[str, Any]
"""What Plotly's JavaScript draws: {"data": traces, "layout": ...} (https://plotly.com/javascript/reference)."""


def write_report(run: Run) -> None:
    """Write report.html of a run that has a verdict."""
    status = read_status(run)
    assert status.verdict is not None, "a report needs a verdict"
    recipe = load_recipe(run.winner_file)
    layers = sum(part.length for part in recipe.slices)
    layers = layers or layer_count(stored_tensor_names(locate(recipe.base.path)))
    front = [] if status.front is None else front_figures(status.front)
    steps = [steps_figure(status.climbs, VALUE_TITLE[status.relative])] if status.climbs else []
    figures = [progress_figure(status), *steps, *front, *coefficient_figures(recipe, layers)]
    write_text(run.report_file, page(status, status.verdict, figures))


def page(status: Status, verdict: dict[str, Any], figures: Iterable[tuple[str, str, Figure]]) -> str:
    """The HTML of the report.  figures: (title, text, figure) each."""
    name = html.escape(status.config.name)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>evomerge: {name}</title><style>{STYLE}</style>",
        f"<h1>{name}</h1>",
        f"<p class=dim>{html.escape(summary(status))}</p>",
        f"<p class='verdict {'yes' if verdict['winner'] else 'no'}'>{html.escape(verdict['sentence'])}</p>",
        "<h2>Holdout scores</h2>",
        score_table(verdict),
        f"<p class=dim>{html.escape(explanation(verdict))}</p>",
        *(f"<p class=dim>{html.escape(a.sentence)}.</p>" for a in status.agreements),
        *([f"<p class=dim>{html.escape(steps_text(status.climbs, status.used))}.</p>"] if status.climbs else []),
        f"<p class=dim>The search used {html.escape(usage_text(status.used, status.price))}.</p>",
    ]
    if status.front is not None:
        parts += ["<h2>The front</h2>", front_table(status.front)]
        parts.append(f"<p class=dim>{html.escape(front_text(status.front))}</p>")
    parts.append(f"<script>{plotly_file('plotly.min.js')}</script>")
    for number, (title, text, figure) in enumerate(figures):
        drawn = drawing(f"figure{number}", figure)
        parts += [f"<h2>{html.escape(title)}</h2>", f"<p class=dim>{html.escape(text)}</p>", drawn]
    return "\n".join(parts) + "\n</html>\n"


def plotly_file(name: str) -> str:
    """A file that the plotly package brings along; importing the package itself takes half a second."""
    file = importlib.metadata.distribution("plotly").locate_file(f"plotly/package_data/{name}")
    return Path(str(file)).read_text(encoding="utf-8")


def drawing(place: str, figure: Figure) -> str:
    """The HTML of one figure.  place: the id of its element."""
    template = json.loads(plotly_file("templates/plotly_white.json"))
    layout = {"template": template, **figure["layout"]}
    options = {"displayModeBar": False, "responsive": True}
    # "<" could end the script wherever it stands in a name.
    data, layout_text = (json.dumps(part).replace("<", "\\u003c") for part in (figure["data"], layout))
    return (
        f"<div id={place} style='height:{layout['height']}px'></div>"
        f"<script>Plotly.newPlot('{place}', {data}, {layout_text}, {json.dumps(options)})</script>"
    )


def summary(status: Status) -> str:
    """Method, sampler, seed, trials, types and the choice of the method in one line."""
    config = status.config
    sources = f"{config.method} of {len(config.sources)} sources"
    types = f"; weights in {config.dtype}, computed in {status.compute_dtype}" if status.compute_dtype else ""
    searched = f"{config.sampler.name}, seed {config.seed}; {status.finished} trials{status.endings}"
    choice = f". Method: {status.choice.sentence}" if status.choice else ""
    return f"{sources}; {searched}{types}{choice}"


def explanation(verdict: dict[str, Any]) -> str:
    """What the numbers of the table mean."""
    items = "; ".join(
        f"{name}: {t['metric']} on {t['items']['holdout']} items "
        f"(searched on {t['items']['search']} by {t['objective']})"
        for name, t in verdict["tasks"].items()
    )
    return (
        "Mean over tasks, 90% intervals (5% on each side); differences are paired. "
        f"{items}. The candidate is {verdict['chosen']['name']}, chosen among "
        f"{len(verdict['finalists'])} models on the selection split. {' '.join(remarks(verdict))}"
    )


def score_table(verdict: dict[str, Any]) -> str:
    """The table of holdout scores: the candidate, then the models that it is compared with."""
    tasks = list(verdict["tasks"])
    head = "".join(f"<th>{html.escape(t)}</th>" for t in tasks)
    score = verdict["score"]
    title = "winner" if verdict["winner"] else "candidate"
    rows = [table_row(title, "candidate", score["value"], spread(score), verdict["holdout"]["winner"], tasks)]
    for c in verdict["comparisons"]:
        gap = f"{title} {interval_text(c['difference'], signed=True)}"
        rows.append(table_row(c["name"], c["kind"], c["score"], gap, verdict["holdout"][c["name"]], tasks))
    return f"<table><tr><th></th><th>mean</th>{head}</tr>{''.join(rows)}</table>"


def table_row(
    name: str, kind: str, mean: float, note: str, scores: dict[str, dict[str, float]], tasks: list[str]
) -> str:
    """A row of the table.  mean: of all tasks.  note: small text below it.  scores: by task."""
    cells = "".join(f"<td>{scores[t]['value']:.3f}<small>{spread(scores[t])}</small></td>" for t in tasks)
    return (
        f"<tr class={kind}><td>{html.escape(name)}</td>"
        f"<td>{mean:.3f}<small>{html.escape(note)}</small></td>{cells}</tr>"
    )


def spread(span: dict[str, Any]) -> str:
    """An interval without its estimate; empty if it is not known."""
    return "" if span["low"] is None else f"[{span['low']:.3f}, {span['high']:.3f}]"


def progress_figure(status: Status) -> tuple[str, str, Figure]:
    """Title, text and plot of the values of all finished trials and of the best value so far."""
    complete = [t for t in status.trials if t.state == TrialState.COMPLETE and t.value is not None]
    values = [float(t.value or 0.0) for t in complete]
    full = [v if in_full(t) else -math.inf for t, v in zip(complete, values, strict=True)]
    best = [max(full[: i + 1]) for i in range(len(full))]
    numbers = [t.number for t in complete]
    names = [status.baselines.get(n, "") for n in numbers]
    searched = [i for i, name in enumerate(names) if not name and full[i] > -math.inf]
    stopped = [i for i, name in enumerate(names) if not name and full[i] == -math.inf]
    known = [i for i, name in enumerate(names) if name]

    def points(name: str, chosen: list[int], marker: dict[str, Any]) -> dict[str, Any]:
        x, y = [numbers[i] for i in chosen], [values[i] for i in chosen]
        return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker}

    data = [
        points("trial", searched, {"color": "#9db7d1", "size": 6}),
        points("stopped early", stopped, {"color": "#d0d0d0", "size": 5, "symbol": "x-thin-open"}),
        points("baseline", known, {"color": PALETTE["uniform"], "size": 9, "symbol": "diamond"})
        | {"text": [names[i] for i in known]},
        {"type": "scatter", "mode": "lines", "name": "best so far", "x": numbers,
         "y": [b if b > -math.inf else None for b in best], "line": {"color": "#1f5f99", "shape": "hv"}},
    ]  # fmt: skip
    ordered = sorted(values)
    floor = ordered[len(ordered) // 10] if ordered else 0.0
    top = max(values, default=1.0)
    margin = (top - floor) * 0.08 or 0.1
    layout = {
        "xaxis": {"title": {"text": "trial"}},
        "yaxis": {"title": {"text": VALUE_TITLE[status.relative]}, "range": [floor - margin, top + margin]},
        "height": 380, "margin": {"t": 20, "r": 20},
    }  # fmt: skip
    figure = {"data": data, "layout": layout}
    return "Best score over trials", "The lowest tenth of the values may lie below the axis.", figure


def front_table(front: Front) -> str:
    """The table of the front: the values of each trial by task."""
    head = "".join(f"<th>{html.escape(task)}</th>" for task in front.tasks)
    rows = (
        f"<tr><td>{html.escape(m.name)}</td>{''.join(f'<td>{value:.3f}</td>' for value in m.values)}</tr>"
        for m in front.members
    )
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def front_text(front: Front) -> str:
    """What the table of the front shows, and how one of its models is exported."""
    unit = "0 is the base, 1 the task's best parent" if front.relative else "unscaled"
    return (
        f"{front.sentence}. Values on the search items ({unit}). Models along the front met on the selection items: "
        "evomerge export --prefer TASK=0.7,TASK=0.3 or --knee writes one of them."
    )


def front_figures(front: Front) -> list[tuple[str, str, Figure]]:
    """Title, text and figure: with two tasks all trials by their values, and the hypervolume over the trials."""
    figures = []
    margin = {"t": 20, "r": 20}
    if len(front.tasks) == 2:
        x, y = front.points.T.tolist()
        names = [t.name for t in front.trials]
        line = sorted(m.values for m in front.members)
        data: list[dict[str, Any]] = [
            {"type": "scatter", "mode": "markers", "name": "trial", "x": x, "y": y, "text": names,
             "marker": {"color": "#9db7d1", "size": 6}},
            {"type": "scatter", "mode": "lines+markers", "name": "front", "x": [v[0] for v in line],
             "y": [v[1] for v in line], "line": {"color": "#1f5f99", "dash": "dot"}, "marker": {"size": 9}},
        ]  # fmt: skip
        figure: Figure = {"data": data, "layout": {**axes(*front.tasks), "height": 420, "margin": margin}}
        figures.append(("Trials by task", "Values on the search items.", figure))
    if front.hypervolumes is not None:
        numbers = list(range(1, len(front.hypervolumes) + 1))
        curve = {"type": "scatter", "mode": "lines", "x": numbers, "y": front.hypervolumes,
                 "line": {"color": "#1f5f99", "shape": "hv"}}  # fmt: skip
        layout = {**axes("trials scored in full", "hypervolume"), "height": 300, "margin": margin}
        text = "The volume of values above the base that some trial reaches or exceeds in every task."
        figures.append(("Hypervolume over trials", text, {"data": [curve], "layout": layout}))
    return figures


def axes(x: str, y: str) -> dict[str, Any]:
    """The part of a layout that gives the axes their titles."""
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def coefficient_figures(recipe: Recipe, layers: int) -> list[tuple[str, str, Figure]]:
    """Title, text and heat map of each parameter of the method that differs between rows or layers.

    Rows are sources and components, columns are layers.  Components with equal values share one row.  A parameter that
    is given by tensor names is left out.

    layers: how many the model has.
    """
    figures = []
    for name, knob in METHODS[recipe.method].knobs.items():
        given = [p.get(name, 0.0) for p in (recipe.parameters, *(s.parameters for s in recipe.sources))]
        if any(map(filtered_values, given)):
            continue
        rows: dict[str, list[float]] = {}
        for i, source in enumerate(recipe.sources if knob.each else [None]):
            per_kind = {}
            for component, part in SHOWN:
                known = [recipe.knobs(TensorRole(layer, component, part=part), layers) for layer in range(layers)]
                per_kind[part or component] = [k.each[name][i] if knob.each else k.shared[name] for k in known]
            for component in ("attention", "mlp"):  # one row for parts that have the values of the whole
                parts = [p for p in PARTS if p.startswith(f"{component}.")]
                if all(per_kind[p] == per_kind[component] for p in parts):
                    per_kind = {kind: row for kind, row in per_kind.items() if kind not in parts}
                else:
                    del per_kind[component]
            alike = len({tuple(row) for row in per_kind.values()}) == 1
            title = source.name if source else name
            rows |= {title if alike else f"{title} · {kind}": row for kind, row in per_kind.items()}
        flat = [x for row in rows.values() for x in row]
        if knob.switch or len(set(flat)) == 1:
            continue
        ordered = sorted(rows)
        span = max(map(abs, flat), default=1.0)
        race_chunk = {
            "type": "heatmap", "z": [rows[r] for r in ordered], "x": list(range(layers)), "y": ordered,
            "colorscale": RED_TO_BLUE, "reversescale": True, "zmid": 0.0, "zmin": -span, "zmax": span,
            "colorbar": {"title": {"text": name}},
        } | ({"texttemplate": "%{z:.2f}"} if layers <= 12 else {})  # fmt: skip
        layout = {
            "xaxis": {"title": {"text": "layer"}, "dtick": 1 if layers <= 16 else 5},
            "yaxis": {"autorange": "reversed"},
            "height": 120 + 26 * len(ordered), "margin": {"t": 20, "l": 150},
        }  # fmt: skip
        figure = {"data": [race_chunk], "layout": layout}
        figures.append((f"{name} of the chosen candidate", f"Method {recipe.method}, by layer and component.", figure))
    return figures
