"""What a run exports: a recipe, and what the card of its model says of it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Recipe
from evomerge.printable import in_markdown
from evomerge.search.run import Run


@dataclass(frozen=True)
class ToExport:
    """A recipe to export.

    results: a section of Markdown for the model's card.
    copy_of: as in `model_card`.
    sentence: what the user is told of the choice; empty if there is nothing to tell.
    """

    recipe: Recipe
    results: str
    copy_of: str | None = None
    sentence: str = ""


def what_to_export(run: Run, trial: int | None, prefer: Mapping[str, float] | None, knee: bool) -> ToExport:
    """What to export of a run; the arguments: see `api.run.Run.export`."""
    if (trial is not None) + (prefer is not None) + knee > 1:
        raise EvomergeError("give one of trial, prefer and knee")
    if trial is not None:
        from evomerge.search.verdict.recommended import recipe_of_trial

        results = f"Trial {trial} of the search; not judged on the holdout.\n"
        return ToExport(recipe_of_trial(run, trial), results)
    return preferred(run, prefer) if prefer is not None or knee else recommended(run)


def preferred(run: Run, weights: Mapping[str, float] | None) -> ToExport:
    """The finalist that is best by these weights of tasks; without weights that at the knee of the front."""
    from evomerge.report.verdict_text import results_section
    from evomerge.search.verdict.choices import choose_knee, prefer

    found = choose_knee(run) if weights is None else prefer(run, weights)
    results = f"{in_markdown(found.sentence)}\n"
    if found.entry.chosen and (verdict := run.verdict()) is not None:
        results += "\n" + results_section(verdict, "winner")
    return ToExport(found.recipe, results, sentence=found.sentence)


def recommended(run: Run) -> ToExport:
    """What the verdict recommends."""
    from evomerge.report.status import read_status
    from evomerge.report.usage_text import usage_section
    from evomerge.report.verdict_text import copied_model, results_section
    from evomerge.search.verdict.recommended import recommended_recipe

    recipe, verdict = recommended_recipe(run)
    results = results_section(verdict)
    with suppress(EvomergeError):  # the recipe can be exported although the database of the study is not there
        results += usage_section(read_status(run))
    return ToExport(recipe, results, copied_model(verdict), verdict["sentence"])
