"""A run as Python sees it: its trials, its verdict, its best recipe, the export of its model."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Recipe
from evomerge.printable import say
from evomerge.search.run import Run as RunFolder
from evomerge.search.run import open_run as open_run_folder
from evomerge.search.storage.database import storage_of
from evomerge.search.storage.optuna_private import key_of_study
from evomerge.search.storage.study import in_full, rank, trial_seconds
from evomerge.search.storage.trial_record import record_of
from evomerge.search.verdict.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

TrialResult = Literal["running", "complete", "stopped early", "broken", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    number: from 0.
    state: `complete`: scored on all items of the search split; `stopped early`: a race showed that it is worse than
        the best, so `value` is an estimate; `broken`: its model is unusable, and `value` that of the worst trial;
        `failed`: it has no value; `running`.
    value: the weighted mean objective over the tasks, the higher the better; None if there is none.
    params: parameter -> its value, a number or the name of a choice.
    baseline: the name of the baseline that the trial is, None if the sampler proposed it.
    evaluated: the share of the items that were scored.
    reason: why it is broken or has failed, else empty.
    seconds: of work.
    """

    number: int
    state: TrialResult
    value: float | None
    params: dict[str, Any]
    baseline: str | None
    evaluated: float
    reason: str
    seconds: float


def trial_of(frozen: FrozenTrial) -> Trial:
    """Optuna's trial of a search with its record, as a `Trial`."""
    record = record_of(frozen)
    state: TrialResult = "running"
    if frozen.state.is_finished():
        state = "complete" if in_full(frozen) else "stopped early" if record.partial is not None else "broken"
        state = state if frozen.state == TrialState.COMPLETE else "failed"
    return Trial(
        number=frozen.number,
        state=state,
        value=frozen.value,
        params=dict(frozen.params),
        baseline=frozen.user_attrs.get("baseline"),
        evaluated=1.0 if state == "complete" else record.partial or 0.0,
        reason=record.failure or "",
        seconds=trial_seconds(frozen),
    )


class Run:
    """A search's run folder: its configuration, its trials, and once the search has ended its verdict.

    Everything is read when it is asked for, so a run that is still going on, in whatever process, shows its latest
    state.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a run folder, see `open_run`."""
        self.files: RunFolder = open_run_folder(Path(folder))

    def __repr__(self) -> str:
        with suppress(EvomergeError):
            if (verdict := self.verdict) is not None:
                return f"Run({str(self.folder)!r}): {verdict.sentence}"
        return f"Run({str(self.folder)!r}): no verdict yet"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.files.folder

    @property
    def report_file(self) -> Path:
        """report.html; during a search it shows what there is so far."""
        return self.files.report_file

    @property
    def config(self) -> SearchConfig:
        """The configuration of the search.  Raises EvomergeError if it cannot be read."""
        return self.files.config()

    @property
    def verdict(self) -> Verdict | None:
        """The verdict, None if there is none yet.  Raises EvomergeError if it cannot be read."""
        content = self.files.verdict()
        return None if content is None else TypeAdapter(Verdict).validate_python(content)

    @property
    def trials(self) -> list[Trial]:
        """All trials by number.  Raises EvomergeError if the study cannot be read."""
        return [trial_of(t) for t in self.files.study().get_trials(deepcopy=False)]

    @property
    def best_recipe(self) -> Recipe:
        """The recipe that the verdict recommends; before there is a verdict, that of the best complete trial.

        Raises EvomergeError if no trial is complete.
        """
        from evomerge.search.verdict.recommended import recipe_of_trial, recommended_recipe

        if self.files.verdict_file.exists():
            return recommended_recipe(self.files)[0]
        best = max(filter(in_full, self.files.study().get_trials(deepcopy=False)), key=rank, default=None)
        if best is None:
            raise EvomergeError(f"{self.folder}: no trial is complete yet")
        return recipe_of_trial(self.files, best.number)

    def trials_dataframe(self) -> "pd.DataFrame":
        """The trials as a pandas table, one row a trial: the attributes of `Trial`, a column `params_NAME` for each
        parameter.  Raises EvomergeError if the study cannot be read."""
        import pandas as pd

        trials = self.trials
        columns: dict[str, list[object]] = {
            field.name: [getattr(trial, field.name) for trial in trials]
            for field in fields(Trial)
            if field.name != "params"
        }
        for name in dict.fromkeys(name for trial in trials for name in trial.params):
            columns[f"params_{name}"] = [trial.params.get(name) for trial in trials]
        return pd.DataFrame(columns)

    def export(
        self,
        out: str | Path | None = None,
        *,
        mergekit: str | Path | None = None,
        lora: int | str | None = None,
        push: str | None = None,
        private: bool = False,
        dry_run: bool = False,
        trial: int | None = None,
        prefer: Mapping[str, float] | None = None,
        knee: bool = False,
        show: bool = True,
    ) -> Recipe:
        """Write the model that the verdict recommends as a model folder, as `evomerge export` does.

        out: the folder to write; it must be new or empty.
        mergekit: a file to write the merge to as a mergekit configuration, instead of the model or beside it.
        lora: write a LoRA adapter of the base instead of the model: "exact" or the largest rank, as for `merge`.  With
            a rank, adapter and model are scored on the selection split.
        push: `owner/name`: upload the folder to this new repository of the Hugging Face hub; without `out` a temporary
            folder is written and removed.
        private: whether only its owner sees the new repository.
        dry_run: print the names and sizes of what would be uploaded; the hub is not asked.
        trial: the number of a finished trial to export instead.
        prefer: export instead the finalist with the highest mean metric on the selection split by these weights of
            tasks, for instance {"math": 0.7, "chat": 0.3}; a task without a weight does not count.
        knee: export instead the finalist whose gain over the base is largest in the task in which it gains least, as a
            share of the largest gain of any finalist.
        show: whether to print progress and notes.

        Returns the recipe; if `out` is given, with the SHA-256 sums of its inputs and outputs.
        Raises EvomergeError if there is no verdict, no such trial or task, or the model cannot be written.
        """
        from evomerge.api.merge import write_merge
        from evomerge.api.push import push_of, pushed
        from evomerge.api.to_export import what_to_export

        chosen = what_to_export(self.files, trial, prefer, knee)
        if show and chosen.sentence:
            say(chosen.sentence)
        with pushed(push_of(push, private, dry_run), chosen.recipe, out, self.folder, show) as folder:
            device, results, copy_of = self.config.device, chosen.results, chosen.copy_of
            written = write_merge(chosen.recipe, folder, mergekit, device, show, results, copy_of, lora)
            if folder is not None and lora not in (None, "exact"):
                from evomerge.api.lora import add_results
                from evomerge.search.verdict.adapter_loss import adapter_loss

                lines = adapter_loss(self.files, chosen.recipe, folder).lines()
                add_results(folder, "## Scores\n\n" + "\n".join(f"- {line}" for line in lines))
                if show:
                    say("\n".join(lines))
        return written


def open_run(folder: str | Path) -> Run:
    """Open an existing run folder.

    folder: of a search that runs, has stopped or has ended.

    Raises EvomergeError if it is not a run folder.
    """
    return Run(folder)


def reader_of_trials(run: RunFolder) -> Callable[[int], Trial]:
    """A function from the number of a trial to the trial, read from the study's database, which it opens once."""
    study = run.study()
    storage = storage_of(study)

    def read(number: int) -> Trial:
        key = storage.get_trial_id_from_study_id_trial_number(key_of_study(study), number)
        return trial_of(storage.get_trial(key))

    return read
