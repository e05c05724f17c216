"""All kinds of workers behave alike: the same scores, and no job is lost when a worker dies or hangs."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from searches import write_config

from evomerge.config.config_file import load_config
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.jobs import EvaluationJob, Failure, Outcome, TrialJob
from evomerge.search.evaluation.race_setup import build_race_setup
from evomerge.search.evaluation.scale import plain_scale
from evomerge.search.evaluation.task_set import TaskSet, open_task_set
from evomerge.search.inputs import create_run
from evomerge.search.models import open_config_models
from evomerge.search.run import Run
from evomerge.search.workers.make_workers import make_workers, setup_of
from evomerge.search.workers.pool import MAX_DEATHS, Pool
from evomerge.search.workers.remote_evaluator import open_evaluator
from evomerge.search.workers.worker import WorkerDied, WorkerSetup
from evomerge.search.workers.worker_options import WorkerOptions, parse_worker_options

KINDS = {"this process": WorkerOptions(1), "processes": WorkerOptions(2), "ray": WorkerOptions(2, "local")}


@dataclass
class Bench:
    """An open pool of one kind of worker, and the event loop in which it runs."""

    kind: str
    pool: Pool
    loop: asyncio.Runner
    task_set: TaskSet
    config: SearchConfig

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run(work)

    def pid(self, number: int) -> int:
        """The process of a worker."""
        worker: Any = self.pool.members[number].worker
        if self.kind == "ray":
            import ray

            pid: int = ray.get(worker.actor.process.remote())
            return pid
        return int(worker.process.pid)

    def recipe(self, *weights: float) -> Recipe:
        config = self.config
        sources = [
            RecipeSource(name=s.name, path=s.path, parameters={"weight": w})
            for s, w in zip(config.sources, weights, strict=True)
        ]
        return Recipe(method="task_arithmetic", dtype=config.dtype, base=Model(path=config.base), sources=sources)


@pytest.fixture(scope="module")
def run(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("workers")
    file = write_config(folder, tiny_family)
    config = load_config(file)
    return create_run(config, open_task_set(config), file, folder / "run")


@pytest.fixture(scope="module", params=KINDS)
def bench(request: pytest.FixtureRequest, run: Run) -> Iterator[Bench]:
    kind = request.param
    if kind == "ray":
        pytest.importorskip("ray", reason='Ray is not installed; `make test-ray` does it: pip install "evomerge[ray]"')
    with asyncio.Runner() as loop:
        config = run.config()
        task_set = open_task_set(config)

        async def opened() -> Pool:
            models = open_config_models(config)
            workers = make_workers(KINDS[kind], run, config, models, task_set, lambda: None, lambda text: None)
            pool = Pool(workers, run.log, max_silence=20.0)
            await pool.open()
            while any(member.state != "idle" for member in pool.members):
                await asyncio.sleep(0.05)
            return pool

        pool = loop.run(opened())
        yield Bench(kind, pool, loop, task_set, config)
        loop.run(pool.close())
    if kind == "ray":
        import ray

        ray.shutdown()


@pytest.fixture(scope="module")
def truth(run: Run) -> Evaluator:
    """The evaluator itself, without any worker around it."""
    config = run.config()
    return Evaluator(config, open_config_models(config), open_task_set(config))


def test_a_trial_has_the_scores_of_the_evaluator_itself(bench: Bench, truth: Evaluator) -> None:
    job = TrialJob(bench.recipe(0.7, 0.6), None)
    found, wanted = bench.run(bench.pool.run(job, "trial")), truth.run(job)
    assert isinstance(found, Outcome)
    assert isinstance(wanted, Outcome)
    assert (found.scores, found.signs) == (wanted.scores, wanted.signs)
    assert found.used.forwards == wanted.used.forwards > 0
    assert set(found.seconds) == set(wanted.seconds)


def test_a_race_is_run_and_stopped_as_in_the_evaluator_itself(bench: Bench, truth: Evaluator) -> None:
    best = truth.run(TrialJob(bench.recipe(0.8, 0.8), None))
    assert isinstance(best, Outcome)
    scale = plain_scale(bench.task_set)
    race_setup = build_race_setup(bench.task_set, scale, "items", [best.scores], 0, bench.config.racing)
    for weights, stopped in (((0.0, 0.1), True), ((0.8, 0.79), False)):
        jobs = [
            TrialJob(bench.recipe(*weights), None, race_setup, race_setup.race(race_setup.values(best.scores), []))
            for _ in range(2)
        ]
        found, wanted = bench.run(bench.pool.run(jobs[0], "trial")), truth.run(jobs[1])
        assert isinstance(found, Outcome)
        assert isinstance(wanted, Outcome)
        assert str(found.scores) == str(wanted.scores)  # NaN where it was stopped
        assert found.estimate == wanted.estimate
        assert (found.estimate is not None) == stopped


def test_an_evaluation_scores_just_the_items_that_are_asked_for(bench: Bench, truth: Evaluator) -> None:
    ids = {"tiny_rev": [i.id for i in bench.task_set.items["tiny_rev"]["holdout"][3:8]]}
    job = EvaluationJob(bench.recipe(0.5, 0.5), "holdout", ids)
    seen: list[tuple[int, int]] = []
    found, wanted = bench.run(bench.pool.run(job, "holdout", lambda *step: seen.append(step))), truth.run(job)
    assert isinstance(found, Outcome)
    assert isinstance(wanted, Outcome)
    assert found.scores == wanted.scores
    assert list(found.scores) == ["tiny_rev"]
    assert len(found.scores["tiny_rev"]["gold_logprob"]) == 5
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_broken_candidate_is_a_result_and_the_worker_goes_on(bench: Bench) -> None:
    broken = bench.run(bench.pool.run(TrialJob(bench.recipe(1e60, 1e60), None), "trial"))
    assert isinstance(broken, Failure)
    assert broken.broken
    assert "finite" in broken.reason
    assert isinstance(bench.run(bench.pool.run(TrialJob(bench.recipe(0.5, 0.5), None), "trial")), Outcome)
    assert [member.restarts for member in bench.pool.members] == [0] * bench.pool.size


def test_as_many_jobs_run_as_there_are_workers(bench: Bench) -> None:
    async def all_at_once() -> tuple[list[Any], int]:
        jobs = [TrialJob(bench.recipe(0.1 * k, 0.5), None) for k in range(6)]
        works = [asyncio.ensure_future(bench.pool.run(job, "trial", trial=k)) for k, job in enumerate(jobs)]
        busiest = 0
        while not all(w.done() for w in works):
            busiest = max(busiest, sum(s.state == "busy" for s in bench.pool.states()))
            await asyncio.sleep(0.01)
        return [w.result() for w in works], busiest

    results, busiest = bench.run(all_at_once())
    assert all(isinstance(r, Outcome) for r in results)
    assert busiest == bench.pool.size


def disturbed(bench: Bench, disturb: Callable[[int], None], jobs: int = 6) -> list[Any]:
    """The results of jobs during which `disturb` is done to the first worker's process."""

    async def work() -> list[Any]:
        works = [
            asyncio.ensure_future(bench.pool.run(TrialJob(bench.recipe(0.1 * k, 0.5), None), f"trial {k}", trial=k))
            for k in range(jobs)
        ]
        while bench.pool.members[0].state != "busy":
            await asyncio.sleep(0.001)
        disturb(bench.pid(0))
        return list(await asyncio.gather(*works))

    return list(bench.run(work()))


def outside(bench: Bench) -> None:
    if bench.kind == "this process":
        pytest.skip("the test would end with this process")


def test_the_job_of_a_killed_worker_is_done_by_another_with_the_same_scores(bench: Bench, truth: Evaluator) -> None:
    outside(bench)
    before = bench.pool.members[0].restarts
    results = disturbed(bench, lambda pid: os.kill(pid, signal.SIGKILL))
    assert bench.pool.members[0].restarts == before + 1
    for k, result in enumerate(results):
        wanted = truth.run(TrialJob(bench.recipe(0.1 * k, 0.5), None))
        assert isinstance(result, Outcome)
        assert isinstance(wanted, Outcome)
        assert result.scores == wanted.scores


def test_a_worker_that_hangs_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    outside(bench)
    while bench.pool.members[0].state != "idle":
        bench.run(asyncio.sleep(0.1))
    monkeypatch.setattr(bench.pool, "max_silence", 2.0)
    results = disturbed(bench, lambda pid: os.kill(pid, signal.SIGSTOP), jobs=2)
    assert all(isinstance(r, Outcome) for r in results)
    assert bench.pool.members[0].restarts >= 1


def test_a_trial_that_takes_too_long_has_failed_and_is_not_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    while all(member.state != "idle" for member in bench.pool.members):
        bench.run(asyncio.sleep(0.1))
    with monkeypatch.context() as patch:
        patch.setattr(bench.pool, "max_job_time", 0.0)
        result = bench.run(bench.pool.run(EvaluationJob(bench.recipe(0.5, 0.5), "holdout"), "trial"))
    if isinstance(result, Failure):  # a fast machine may be done before the first look
        assert "longer than" in result.reason
    assert isinstance(bench.run(bench.pool.run(TrialJob(bench.recipe(0.5, 0.5), None), "trial")), Outcome)


def test_a_job_that_kills_every_worker_is_given_up(run: Run) -> None:
    """With a worker that always dies: real ones are killed in the tests above."""

    class Mortal:
        device, heartbeats, started = "cpu", 0, 0

        async def start(self) -> None:
            self.started += 1

        async def run(self, job: Any, progress: Any) -> Any:
            raise WorkerDied("was killed by SIGKILL")

        async def kill(self) -> None: ...

        def close(self) -> None: ...

    async def work() -> tuple[Any, int]:
        workers = [Mortal(), Mortal()]
        pool = Pool(workers, lambda text: None)
        await pool.open()
        source = RecipeSource(name="a", path="a", parameters={"weight": 1.0})
        job = TrialJob(Recipe(method="linear", base=Model(path="b"), sources=[source]), None)
        result = await pool.run(job, "trial")
        await asyncio.sleep(0)
        await pool.close()
        return result, sum(w.started for w in workers)

    result, _ = asyncio.run(work())
    assert isinstance(result, Failure)
    assert f"died {MAX_DEATHS} times" in result.reason
    assert "SIGKILL" in result.reason


def test_a_mistake_in_the_program_ends_the_driver_that_waits_for_its_worker() -> None:
    class Faulty:
        device, heartbeats = "cpu", 0

        async def start(self) -> None:
            raise IndexError("a mistake")

        async def run(self, job: Any, progress: Any) -> Any: ...

        async def kill(self) -> None: ...

        def close(self) -> None: ...

    async def work() -> None:
        pool = Pool([Faulty()], lambda text: None)
        try:
            await asyncio.wait_for(pool.open(), timeout=10)
        finally:
            await pool.close()

    with pytest.raises(IndexError, match="a mistake"):
        asyncio.run(work())


def test_a_worker_whose_files_are_others_is_refused(run: Run) -> None:
    config = run.config()
    setup = setup_of(run, config)

    def opened(changed: WorkerSetup) -> None:
        open_evaluator(changed, lambda: None, print, lambda done, total: None)

    opened(replace(setup, host="elsewhere"))  # another machine compares hashes
    others = {**setup.inputs, "rev": {"model.safetensors": "0" * 64}}
    with pytest.raises(EvomergeError, match=r"the model files of rev on .* are not those that the driver has"):
        opened(replace(setup, host="elsewhere", inputs=others))
    with pytest.raises(EvomergeError, match=r"the items of tiny_rev on .* are not those"):
        opened(replace(setup, items={"tiny_rev": {"search": "0" * 64}}))


def test_a_source_that_is_replaced_while_the_search_runs_ends_it(tiny_family: Path, tmp_path: Path) -> None:
    for part in ("base", "rev", "add"):
        shutil.copytree(tiny_family / part, tmp_path / part)
    config = load_config(write_config(tmp_path, tmp_path))
    evaluator = Evaluator(config, open_config_models(config), open_task_set(config))
    sources = [RecipeSource(name=s.name, path=s.path, parameters={"weight": 0.5}) for s in config.sources]
    recipe = Recipe(method="linear", dtype="float32", base=Model(path=config.base), sources=sources)
    assert isinstance(evaluator.run(TrialJob(recipe, None)), Outcome)
    os.utime(tmp_path / "add" / "model.safetensors", ns=(0, 0))
    with pytest.raises(EvomergeError, match=r"add/model\.safetensors: changed while the search runs"):
        evaluator.run(TrialJob(recipe, None))


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1.5", "٣", "9999", ""])
def test_a_wrong_number_of_workers_is_one_error(workers: str) -> None:
    with pytest.raises(EvomergeError, match="--workers"):
        parse_worker_options(workers, None)


def test_auto_is_one_worker_where_there_is_one_device() -> None:
    assert parse_worker_options(None, None) == WorkerOptions(1)
    assert parse_worker_options("auto", None) == WorkerOptions("auto")
    assert parse_worker_options(None, "local") == WorkerOptions("auto", "local")
    assert parse_worker_options("3", None) == WorkerOptions(3)
