"""What the page does when something is moved, chosen or clicked.

The page keeps two things: the recipe that its sliders start from, and where they stand now.  Every event gets both, so
two tabs of a browser have nothing in common but the live model.  `present` makes a recipe of them.

Every function returns new values for parts of the page, in the order that page.py names beside it.
"""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Recipe
from evomerge.play.live_model import recipe_name
from evomerge.play.playground import Playground, QuickScore, save_recipe
from evomerge.play.sliders import GROUPS, SHOWN, Slider

THIS = "this recipe"  # what the sliders make
BY_SOURCE = ("weight", "density")
LIMIT = 64  # new tokens, where none are given


class Events:
    """The events of one page.

    play: the playground.
    """

    def __init__(self, play: Playground) -> None:
        self.play = play
        self.controls = play.controls
        groups = (None, *GROUPS)
        self.every = [Slider(knob, source, g) for source in self.controls.sources for knob in BY_SOURCE for g in groups]
        self.every += [Slider(knob) for knob in SHOWN if knob not in BY_SOURCE]
        """All sliders of the page, of which a recipe has some."""

    def present(self, start: Recipe, split: bool, values: Sequence[float | None]) -> Recipe:
        """The recipe that the page shows.

        start: where its sliders start.
        split: whether each group of components has its own sliders.
        values: where they stand, in the order of `every`.  One that stands where it started leaves its coefficient as
            it is.
        """
        shown = set(self.controls.sliders(start, split))
        now = {s: v for s, v in zip(self.every, values, strict=True) if s in shown and v is not None}
        return self.controls.moved(start, {s: v for s, v in now.items() if v != self.controls.shown(start, s)})

    # --- Events that change where the sliders start: state, method, sliders, line of state ---

    def choose(self, preset: str, split: bool) -> list[Any]:
        """A preset was chosen, or is taken again."""
        return self.begin(self.play.presets.recipes[preset], split)

    def change_method(self, method: str, start: Recipe, split: bool, *values: float) -> list[Any]:
        """A method was chosen; coefficients that it has too stay."""
        if method == start.method:  # Gradio sends this event twice, the second time with sliders of the old method
            return [gr.skip() for _ in range(len(self.every) + 3)]
        try:
            return self.begin(self.controls.with_method(self.present(start, split, values), method), split)
        except EvomergeError as error:
            return [start, gr.update(value=start.method), *[gr.skip() for _ in self.every], wrong(error)]

    def change_split(self, split: bool, start: Recipe, *values: float) -> list[Any]:
        """Sliders of groups, or of the whole model, are wanted."""
        try:
            return self.begin(self.present(start, not split, values), split)
        except EvomergeError as error:
            return [*self.begin(start, split)[:-1], wrong(error)]

    def begin(self, start: Recipe, split: bool) -> list[Any]:
        """Merge a recipe and set the sliders to it."""
        method = gr.update(value=start.method, interactive=self.controls.movable(start))
        try:
            state = self.merged(start)
        except EvomergeError as error:
            state = wrong(error)
        return [start, method, *(gr.update(**self.look(start, split, s)) for s in self.every), state]

    def look(self, start: Recipe, split: bool, slider: Slider) -> dict[str, Any]:
        """How a slider looks for a recipe; one that the recipe does not have is hidden."""
        if slider not in self.controls.sliders(start, split):
            return {"visible": False}
        low, high = self.controls.bounds(start, slider)
        return {"value": self.controls.shown(start, slider), "minimum": low, "maximum": high, "visible": True}

    # --- Events that leave them there ---

    def move(
        self, follow: bool, text: str, chat: bool, stop: str, limit: int | None,
        start: Recipe, split: bool, *values: float,
    ) -> Iterator[tuple[Any, Any]]:  # fmt: skip
        """A slider was moved: line of state, and if the answer is to follow, the box of this recipe."""
        try:
            recipe = self.present(start, split, values)
            yield self.merged(recipe), gr.skip()
            if follow and text.strip():
                yield gr.skip(), self.answered(THIS, recipe, text, chat, stop, limit)
        except EvomergeError as error:
            yield wrong(error), gr.skip()

    def ask(
        self, left: str, middle: str, text: str, chat: bool, stop: str, limit: int | None,
        start: Recipe, split: bool, *values: float,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """A prompt was sent: the three boxes, one after the other, and the line of state."""
        boxes = [gr.skip(), gr.skip(), gr.skip()]
        try:
            for k, (name, recipe) in enumerate(self.beside(left, middle, self.present(start, split, values))):
                boxes[k] = self.answered(name, recipe, text, chat, stop, limit)
                yield [*boxes, gr.skip()]
        except EvomergeError as error:
            yield [*boxes, wrong(error)]

    def answered(self, name: str, recipe: Recipe, text: str, chat: bool, stop: str, limit: int | None) -> Any:
        """A box with a recipe's answer, and with the recipe that gave it."""
        reply = self.play.ask(recipe, text, chat, unescaped(stop), limit or LIMIT)
        cut = ", cut at the limit" if reply.cut else ""
        info = f"{reply.recipe} {self.controls.summary(recipe)}: {reply.seconds:.2f} s{cut}"
        return gr.update(label=name, info=info, value=reply.text)

    def score(
        self, left: str, middle: str, items: int, start: Recipe, split: bool, *values: float
    ) -> Iterator[tuple[Any, Any]]:
        """Scores are wanted: the table, column by column, and the line of state."""
        columns: list[tuple[str, Recipe, list[QuickScore]]] = []
        try:
            for name, recipe in self.beside(left, middle, self.present(start, split, values)):
                columns.append((name, recipe, self.play.score(recipe, items)))
                yield score_table(columns), gr.skip()
        except EvomergeError as error:
            yield gr.skip(), wrong(error)

    def take(self, number: int) -> list[Any]:
        """A search item was chosen as the prompt: prompt, chat template, end, limit."""
        found = self.play.examples[number]
        return [found.prompt, found.chat, escaped(found.stop), found.limit]

    def right(self, text: str) -> str:
        """The prompt has changed: its right answer, if it is a search item's."""
        gold = next((example.gold for example in self.play.examples if example.prompt == text), None)
        return "" if gold is None else f"Right answer: {html.escape(escaped(gold))}"

    def save(self, path: str, start: Recipe, split: bool, *values: float) -> str:
        """The recipe is to be saved: a line that says where it is."""
        try:
            if not path.strip():
                raise EvomergeError("give the name of a new file")
            file = Path(path.strip()).expanduser().absolute()
            recipe = self.present(start, split, values)
            save_recipe(recipe, file)
        except EvomergeError as error:
            return wrong(error)
        command = f"evomerge merge {file} --out merged/"
        return (
            f"Recipe <code>{recipe_name(recipe)}</code> written. <code>{html.escape(command)}</code> makes the model."
        )

    # --- Words ---

    def beside(self, left: str, middle: str, this: Recipe) -> list[tuple[str, Recipe]]:
        """The three recipes that stand side by side, with their names."""
        return [*((name, self.play.presets.recipes[name]) for name in (left, middle)), (THIS, this)]

    def merged(self, recipe: Recipe) -> str:
        """Merge a recipe, and say how long that took."""
        done = self.play.live.merge(recipe)
        how = f"merged in {done.seconds:.2f} s" if done.seconds else "merged"
        return f"<code>{done.recipe}</code> {html.escape(self.controls.summary(recipe))}: {how}"


def wrong(error: Exception) -> str:
    """What is wrong, in a line of state."""
    return f'<span class="wrong">{html.escape(str(error))}</span>'


def escaped(text: str) -> str:
    """A text on one line, with \\n for a new line."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def unescaped(text: str) -> str:
    """The text that `escaped` made a line of."""
    parts = (part.replace("\\n", "\n").replace("\\t", "\t") for part in text.split("\\\\"))
    return "\\".join(parts)


def score_table(columns: Sequence[tuple[str, Recipe, list[QuickScore]]]) -> str:
    """Scores as a table: a row for each task's metric and objective, a column for each recipe."""
    heads = "".join(f"<th>{html.escape(name)}<small>{recipe_name(recipe)}</small></th>" for name, recipe, _ in columns)
    rows = []
    for found in zip(*(scores for _, _, scores in columns), strict=True):
        one = found[0]
        metric = one.metric, [s.by_metric for s in found]
        objective = f"{one.objective}, the objective", [s.by_objective for s in found]
        for measure, values in (metric, objective):
            cells = "".join(f"<td>{value:.3f}</td>" for value in values)
            rows.append(f"<tr><td>{html.escape(one.task)}<small>{html.escape(measure)}</small></td>{cells}</tr>")
    return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
