"""SIGKILL at a random moment of each kind of search; every one goes on to the undisturbed run's bits."""

from typing import Any

from searches import ROOT

from disturbances.disturbed import Disturbed, gradient_steps, injection, killed_and_resumed

LEARNED = {"sampler": {"name": "auto", "steps": 12}}
TASKS = [{"task": str(ROOT / "evals" / "tiny" / f"{skill}.yaml")} for skill in ("rev", "add")]


def killed(search: Disturbed, changes: dict[str, Any]) -> str:
    search.changes = changes
    what = killed_and_resumed(search)
    steps = len(gradient_steps(search.run))
    return f"{what}, {steps} gradient steps" if steps else what


@injection("SIGKILL in the learned start")
def _(search: Disturbed) -> str:
    return killed(search, LEARNED)


@injection("SIGKILL of a search with a guard")
def _(search: Disturbed) -> str:
    guard = {"task": str(ROOT / "evals" / "tiny" / "sort.yaml"), "max_drop": 0.05}
    return killed(search, LEARNED | {"guards": [guard]})


@injection("SIGKILL of a search for the Pareto front")
def _(search: Disturbed) -> str:
    return killed(search, {"goals": "pareto", "tasks": TASKS, "sampler": {"name": "auto", "steps": 9}})


@injection("SIGKILL of a search from coarse to fine")
def _(search: Disturbed) -> str:
    return killed(
        search,
        {
            "space": {"weight": [0.0, 1.6], "granularity": "layer", "components": ["attention", "mlp"]},
            "sampler": {"name": "cma-es", "population": 4, "coarse": 4},
        },
    )
