"""The end of a search: finalists on the selection split, the chosen one on the holdout, the verdict on paper."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from evomerge.evaluate.tasks import Item, Split
from evomerge.files import write_text
from evomerge.merge.recipe import Recipe, dump_recipe
from evomerge.search.baselines import Baseline
from evomerge.search.cma import CmaEsSampler
from evomerge.search.run import Run
from evomerge.search.scorer import Scorer
from evomerge.search.scores import ledger_key, of_record, pack, store_items
from evomerge.search.soup import GreedySoup
from evomerge.search.study import SearchStudy, checkpoint
from evomerge.search.verdict import Verdict, interval, judge, mean_score, resampled_means

FINALISTS = 5

Scores = dict[str, dict[str, list[float]]]
"""Task -> metric -> one score per item."""

Known = dict[str, dict[str, dict[str, float]]]
"""Task -> metric -> item id -> its score."""


def digest(recipe: Recipe) -> str:
    """Sixteen hexadecimal digits that name a recipe."""
    return hashlib.sha256(recipe.model_dump_json(exclude={"outputs"}).encode()).hexdigest()[:16]


class Ledger:
    """Full evaluations outside the trials, kept in the study item by item, so that nothing is evaluated twice."""

    def __init__(self, study: optuna.Study, scorer: Scorer, run: Run, progress: Callable[[int, int], None]) -> None:
        self.study = study
        self.scorer = scorer
        self.run = run
        self.progress = progress
        self.names: dict[Split, str] = {}

    def known(self, split: Split, recipe: Recipe) -> Known:
        """What is in the study already."""
        attributes = self.study.user_attrs
        found: Known = {}
        for row in of_record(attributes, attributes.get(ledger_key(split, digest(recipe)), {}), {}):
            found.setdefault(row["task"], {}).setdefault(row["metric"], {})[row["item"]] = row["score"]
        return found

    def items(self, split: Split) -> str:
        """The name under which the study keeps the ids of a split's items."""
        if split not in self.names:
            self.names[split] = store_items(self.study, self.scorer.split(split))
        return self.names[split]

    def missing(self, split: Split, known: Known) -> dict[str, list[Item]]:
        """Per task, the items that lack a score of the objective or the metric."""
        found = {}
        for task in self.scorer.tasks:
            tables = [known.get(task.name, {}).get(metric, {}) for metric in (task.objective, task.metric)]
            found[task.name] = [i for i in self.scorer.items[task.name][split] if not all(i.id in t for t in tables)]
        return {task: items for task, items in found.items() if items}

    def stored(self, split: Split, recipe: Recipe) -> Scores | None:
        """Every metric of a recipe on a split, None if the study does not have all of it."""
        known = self.known(split, recipe)
        return None if self.missing(split, known) else self.arranged(split, known)

    def arranged(self, split: Split, known: Known) -> Scores:
        """The scores of the split's items, in the split's order; only metrics that every item has."""
        found: Scores = {}
        for task in self.scorer.tasks:
            ids = [i.id for i in self.scorer.items[task.name][split]]
            tables = known[task.name].items()
            found[task.name] = {m: [t[i] for i in ids] for m, t in tables if all(i in t for i in ids)}
        return found

    def score(self, split: Split, recipe: Recipe) -> Scores:
        """Every metric of a recipe on a split; what the study has is taken from there, only the rest is evaluated."""
        known = self.known(split, recipe)
        if missing := self.missing(split, known):
            count = sum(map(len, missing.values()))
            self.run.log(f"scoring {recipe.method} {digest(recipe)} on {count} items of {split}")
            outcome = self.scorer.evaluate(recipe, split, everything=True, only=missing, progress=self.progress)
            for task, metrics in outcome.scores.items():
                for metric, scores in metrics.items():
                    new = {i.id: score for i, score in zip(missing[task], scores, strict=True)}
                    known.setdefault(task, {}).setdefault(metric, {}).update(new)
            self.store(split, recipe, self.arranged(split, known))
        return self.arranged(split, known)

    def store(self, split: Split, recipe: Recipe, scores: Scores) -> None:
        """Keep scores in the study, in one write."""
        packed = {task: {metric: pack(s) for metric, s in metrics.items()} for task, metrics in scores.items()}
        self.study.set_user_attr(ledger_key(split, digest(recipe)), {"items": self.items(split), "scores": packed})
        checkpoint(self.study)

    def means(self, scores: Scores, which: str) -> dict[str, list[float]]:
        return {t.name: scores[t.name][getattr(t, which)] for t in self.scorer.tasks}


def search_score(study: SearchStudy, ledger: Ledger, baseline: Baseline, phase: Callable[[str], None]) -> float:
    """A baseline's objective on the search split: its trial's, or the ledger's if it has no trial (yet).

    Minus infinity if the model is broken: a failed trial, a score that is not finite.
    """
    if baseline.point is not None and (trial := study.of_baseline(baseline.name)) is not None:
        return -float("inf") if trial.value is None else trial.value
    if ledger.stored("search", baseline.recipe) is None:
        phase(f"baseline {baseline.name}")
    try:
        scores = ledger.score("search", baseline.recipe)
    except ArithmeticError:
        return -float("inf")
    return mean_score(ledger.means(scores, "objective"), ledger.scorer.weights)


@dataclass(frozen=True)
class Finalist:
    """A candidate for the win.  trial: its number, None for the mean of the search distribution."""

    name: str
    trial: int | None
    recipe: Recipe


def finalists(study: SearchStudy) -> list[Finalist]:
    """The best finished trials by objective, and the mean of the final search distribution."""
    complete = sorted(study.complete, key=lambda t: (-(t.value or 0.0), t.number))
    found = [Finalist(label(t), t.number, study.space.recipe(t.params)) for t in complete[:FINALISTS]]
    sampler = study.sampler(len(study.trials))
    if isinstance(sampler, CmaEsSampler) and (mean := sampler.mean(study.mirror)) is not None:
        found.append(Finalist("mean of the search distribution", None, study.space.recipe(mean)))
    unique: dict[str, Finalist] = {}
    for finalist in found:
        unique.setdefault(digest(finalist.recipe), finalist)
    return list(unique.values())


def label(trial: FrozenTrial) -> str:
    baseline = trial.user_attrs.get("baseline")
    return f"trial {trial.number}" + (f" ({baseline})" if baseline else "")


def finish(
    run: Run,
    study: SearchStudy,
    ledger: Ledger,
    known: list[Baseline],
    soup: GreedySoup,
    phase: Callable[[str], None],
) -> Verdict:
    """Choose on the selection split, judge on the holdout split, write verdict.json and recommended.yaml.

    known: every baseline, the greedy soup's included.
    """
    scorer = ledger.scorer
    scored: list[tuple[float, float, Finalist]] = []
    for finalist in finalists(study):
        phase(f"selection: {finalist.name}")
        scores = ledger.score("selection", finalist.recipe)
        ranks = [mean_score(ledger.means(scores, which), scorer.weights) for which in ("metric", "objective")]
        scored.append((ranks[0], ranks[1], finalist))
    scored.sort(key=lambda s: (-s[0], -s[1]))
    chosen = scored[0][2]
    rivals = holdout_baselines(study, ledger, known, phase)
    phase(f"holdout: {chosen.name}")
    chosen_scores = ledger.score("holdout", chosen.recipe)
    baseline_scores = {}
    for rival in rivals:
        phase(f"holdout: {rival.name}")
        baseline_scores[rival.name] = rival.kind, ledger.score("holdout", rival.recipe)
    verdict = judge(
        ledger.means(chosen_scores, "metric"),
        {name: (kind, ledger.means(s, "metric")) for name, (kind, s) in baseline_scores.items()},
        scorer.weights,
        scorer.config.seed,
    )
    recipes = {rival.name: rival.recipe for rival in rivals} | {"winner": chosen.recipe}
    tables = {"winner": chosen_scores} | {name: s for name, (_, s) in baseline_scores.items()}
    uses = int(study.stored.user_attrs.get("holdout_uses", 0)) + (0 if seen_before(run, chosen.recipe) else 1)
    study.stored.set_user_attr("holdout_uses", uses)
    content = verdict.as_dict() | {
        "chosen": {"name": chosen.name, "trial": chosen.trial, "recipe": digest(chosen.recipe)},
        "finalists": [
            {"name": f.name, "trial": f.trial, "selection_metric": m, "selection_objective": o} for m, o, f in scored
        ],
        "holdout": {name: task_table(scorer, scores) for name, scores in tables.items()},
        "holdout_uses": uses,
        "greedy_soup": soup.sentence,
        "tasks": {
            t.name: {
                "metric": t.metric,
                "objective": t.objective,
                "weight": t.weight,
                "items": {split: len(items) for split, items in scorer.items[t.name].items()},
            }
            for t in scorer.tasks
        },
    }
    write_text(run.recommended_file, dump_recipe(recipes[verdict.recommended]))
    write_text(run.folder / "winner.yaml", dump_recipe(chosen.recipe))
    write_text(run.verdict_file, json.dumps(content, indent=2) + "\n")
    run.log(verdict.sentence)
    return verdict


def holdout_baselines(
    study: SearchStudy, ledger: Ledger, known: list[Baseline], phase: Callable[[str], None]
) -> list[Baseline]:
    """Every parent, the uniform blend, the greedy soup, and the recommended recipe that did best in the search."""
    chosen = [b for b in known if b.kind != "recommended"]
    recommended = [b for b in known if b.kind == "recommended"]
    return chosen + sorted(recommended, key=lambda b: -search_score(study, ledger, b, phase))[:1]


def seen_before(run: Run, recipe: Recipe) -> bool:
    """Whether the holdout items have already judged this very recipe (a repeated `resume` looks at nothing new)."""
    try:
        previous: dict[str, Any] = json.loads(run.verdict_file.read_text(encoding="utf-8"))
        return bool(previous["chosen"]["recipe"] == digest(recipe))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def task_table(scorer: Scorer, scores: Scores) -> dict[str, dict[str, float]]:
    """Per task: the metric with its interval and the mean objective."""
    table = {}
    for task in scorer.tasks:
        own = {task.name: scores[task.name][task.metric]}
        weights = {task.name: 1.0}
        span = interval(mean_score(own, weights), resampled_means(own, weights, scorer.config.seed))
        objective = mean_score({task.name: scores[task.name][task.objective]}, weights)
        table[task.name] = {"value": span.value, "low": span.low, "high": span.high, "objective": objective}
    return table
