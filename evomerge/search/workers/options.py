"""How many workers of which kind a search gets."""

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from evomerge.config.schema import SearchConfig
from evomerge.device import resolve_device
from evomerge.merge.bank.memory import Share
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.models import model_folders, stamps
from evomerge.search.run import Run
from evomerge.search.workers.local import LocalWorker
from evomerge.search.workers.process import ProcessWorker
from evomerge.search.workers.worker import Progress, Setup, Worker
from evomerge.search.workers.worker_options import WorkerOptions
from evomerge.sources.open_models import Models


def device_kind(worker_options: WorkerOptions, config: SearchConfig) -> str:
    """`cpu`, `cuda`: the kind of device that the workers of a worker options will compute on."""
    if worker_options.ray is None:
        return resolve_device(config.device).type
    connect_ray(worker_options.ray)
    from evomerge.search.workers.ray_worker import cluster_device

    return cluster_device(config.device)


def connect_ray(address: str) -> None:
    """Join the cluster, once."""
    if address == "local":
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read at Ray's import: it then keeps to 127.0.0.1
    from evomerge.search.workers.ray_worker import connect

    connect(address)


def make_workers(
    worker_options: WorkerOptions,
    run: Run,
    config: SearchConfig,
    models: Models,
    task_set: TaskSet,
    stop: Callable[[], None],
    phase: Callable[[str], None],
) -> list[Worker]:
    """The workers of a search, not started yet.  One worker without Ray is this process itself."""
    if worker_options.ray is not None:
        connect_ray(worker_options.ray)
        from evomerge.search.workers.ray_worker import RayWorker, cluster_room, workers_of_a_machine

        count = cluster_room(config.device, worker_options.count)
        # Ray shows every worker its own accelerator alone; it does not say beforehand how many share a machine.
        device = "cuda" if config.device.startswith("cuda") else config.device
        setup = setup_of(run, config.model_copy(update={"device": device}))
        setup = replace(setup, share=Share(host=workers_of_a_machine(count)))
        return [RayWorker(setup, run.log) for _ in range(count)]
    devices = devices_of(config.device)
    count = len(devices) if worker_options.count == "auto" else worker_options.count
    if count == 1:
        if len(devices) > 1:
            run.log(f"note: one of {len(devices)} accelerators is used; --workers auto uses them all")

        def make(check: Callable[[], None], progress: Progress) -> Evaluator:
            phase("preparing the items")
            evaluator = Evaluator(config, models, task_set, check, run.log, run.folder / "cache", progress)
            phase("measuring the sources")
            evaluator.prepare(run.manifest()["inputs"])
            return evaluator

        return [LocalWorker(make, devices[0], stop)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // count) if devices == ["cpu"] else None
    names = [devices[k % len(devices)] for k in range(count)]
    setup = setup_of(run, config)
    shares = {d: Share(names.count(d), count) for d in devices}
    setups = [replace(setup, share=shares[d]) for d in names]
    return [
        ProcessWorker(s, d, threads, log_of(run, k), run.log)
        for k, (s, d) in enumerate(zip(setups, names, strict=True))
    ]


def devices_of(wanted: str) -> list[str]:
    """What a configuration's `device` may mean on this machine, by name."""
    device = resolve_device(wanted)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    return [str(device)]


def setup_of(run: Run, config: SearchConfig) -> Setup:
    """What workers outside this process are told; the database and its password are not their affair."""
    told = config.model_copy(update={"storage": None})
    manifest, files = run.manifest(), stamps(model_folders(config))
    return Setup(told, run.folder.resolve(), platform.node(), files, manifest["inputs"], manifest["items"])


def log_of(run: Run, number: int) -> Path:
    """Where worker `number` prints; it is empty unless something is wrong."""
    (run.folder / "workers").mkdir(exist_ok=True)
    return run.folder / "workers" / f"{number}.txt"
