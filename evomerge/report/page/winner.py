"""What the chosen candidate is made of: where it comes from, its coefficients by layer and component, its recipe."""

import math
import sys
from collections.abc import Mapping, Sequence
from html import escape

from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.coefficients import filtered_values
from evomerge.merge.recipe.pinned_inputs import without_fingerprints
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.report.page.material import Material
from evomerge.report.page.parts import copied, section, table, text
from evomerge.report.verdict_text import candidate_title
from evomerge.search.storage.trial_record import LEARNED
from evomerge.sources.tensor_names import PARTS, Component, Part, TensorRole

SHOWN: tuple[tuple[Component, Part | None], ...] = (
    ("attention", None), ("attention", "attention.q"), ("attention", "attention.k"), ("attention", "attention.v"),
    ("attention", "attention.o"), ("mlp", None), ("mlp", "mlp.gate"), ("mlp", "mlp.up"), ("mlp", "mlp.down"),
    ("norm", None),
)  # fmt: skip

MOST_CELLS = 4000  # of one table

Rows = Mapping[str, Sequence[float]]
"""Source and component -> one value a layer."""


def winner_section(material: Material) -> str:
    """The chosen candidate; empty without a verdict."""
    verdict, recipe = material.verdict, material.recipe
    if verdict is None or recipe is None:
        return ""
    title = candidate_title(verdict)
    content = [text(provenance(material)), text(about_method(recipe.method), "dim")]
    for name, rows in coefficients(recipe, material.layers).items():
        about = f"Method {recipe.method}, by layer (0 is the first) and component."
        content += [f"<h3>{escape(name)}</h3>", text(about, "dim"), heat_table(rows)]
    content.append("<h3>Recipe</h3>" + copied(dump_recipe(without_fingerprints(recipe))))
    return section("winner", f"What the {title} is made of" if verdict["winner"] else f"The {title}'s recipe", *content)


def provenance(material: Material) -> str:
    """Where the candidate comes from, in words."""
    verdict, recipe = material.verdict, material.recipe
    assert verdict is not None, "a candidate has a verdict"
    assert recipe is not None, "a candidate has a recipe"
    chosen, config = verdict["chosen"], material.status.config
    sources = ", ".join(source.name for source in recipe.sources)
    trial = next((t for t in material.status.trials if t.number == chosen.get("trial")), None)
    by = ""
    if trial is not None and "baseline" not in trial.user_attrs:
        steps = trial.user_attrs.get(LEARNED)
        by = f"reached after {steps} gradient steps" if steps else f"proposed by {config.sampler.name}"
    parts = [
        f"{chosen['name']}: {recipe.method} of {sources} on the base model, in {recipe.dtype}",
        by,
        f"seed {config.seed}",
        f"recipe {chosen['recipe']}" if chosen.get("recipe") else "",
    ]
    return f"{'; '.join(filter(None, parts))}. {verdict.get('simplified', '')}".strip()


def about_method(name: str) -> str:
    """A method's first line of documentation, which names its paper; empty for one that has none."""
    module = sys.modules.get(getattr(METHODS[name].plan, "__module__", ""))
    return ((module.__doc__ if module else None) or "").partition("\n")[0]


def coefficients(recipe: Recipe, layers: int) -> dict[str, Rows]:
    """Each parameter of the method that differs between rows or layers, with its rows.

    Components with equal values share one row.  A parameter that is given by tensor names is left out.

    layers: how many the model has.
    """
    found: dict[str, Rows] = {}
    for name, knob in METHODS[recipe.method].knobs.items():
        given = [p.get(name, 0.0) for p in (recipe.parameters, *(s.parameters for s in recipe.sources))]
        if knob.switch or any(map(filtered_values, given)):
            continue
        rows: dict[str, list[float]] = {}
        for i, source in enumerate(recipe.sources if knob.each else [None]):
            per_kind: dict[str, list[float]] = {}
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
        if len({x for row in rows.values() for x in row}) > 1:
            found[name] = rows
    return found


def heat_table(rows: Rows, digits: int = 2) -> str:
    """A table whose cells are the darker the farther their value is from zero: blue above, orange below.

    Of more than MOST_CELLS cells it has those of every second layer, every third layer and so on.
    """
    most = max((abs(x) for row in rows.values() for x in row), default=1.0) or 1.0

    def cell(value: float) -> str:
        return (
            f"<td class={'n' if value < 0 else 'p'} style='--v:{90 * abs(value) / most:.0f}%'>{value:.{digits}f}</td>"
        )

    columns = max(map(len, rows.values()), default=0)
    if all(len(set(row)) == 1 for row in rows.values()):
        rows, columns = {name: row[:1] for name, row in rows.items()}, 1
    every = math.ceil(columns * len(rows) / MOST_CELLS)
    head = "".join(f"<th>{layer if columns > 1 else 'all layers'}</th>" for layer in range(0, columns, every or 1))
    rows = {name: row[:: every or 1] for name, row in rows.items()}
    body = "".join(f"<tr><td>{escape(name)}</td>{''.join(map(cell, row))}</tr>" for name, row in rows.items())
    whole = f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class='box heat'><table class=heat>{whole}</table></div>"


def bar_table(rows: Sequence[tuple[str, float, str]]) -> str:
    """Numbers as bars.  rows: name, number, and its text."""
    most = max((abs(number) for _, number, _ in rows), default=1.0) or 1.0
    cells = [
        [
            escape(name),
            f"<i class={'n' if number < 0 else 'p'} style='width:{100 * abs(number) / most:.1f}%'></i>",
            words,
        ]
        for name, number, words in rows
    ]
    return table(["", "", ""], cells, "bars")
