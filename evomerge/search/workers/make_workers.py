"""Makes the workers of a search: in this process, in processes of this machine, or on a Ray cluster."""

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
from evomerge.search.models import model_folders, model_stamps
from evomerge.search.opened import Opened
from evomerge.search.run import Run
from evomerge.search.workers.local_worker import LocalWorker
from evomerge.search.workers.process_worker import ProcessWorker
from evomerge.search.workers.worker import BatchProgress, Worker, WorkerSetup
from evomerge.search.workers.worker_options import WorkerOptions
from evomerge.sources.open_models import Models


def make_workers(
    options: WorkerOptions,
    run: Run,
    config: SearchConfig,
    models: Models,
    task_set: TaskSet,
    stop: Callable[[], None],
    phase: Callable[[str], None],
    opened: Opened | None = None,
) -> list[Worker]:
    """Make the workers of a search, without starting them.

    stop: called between batches by a worker in this process; raises when the user wants to stop.
    phase: gets what a worker in this process does while it starts.
    opened: may have a live model, which a worker in this process uses.
    """
    if options.ray is not None:
        return ray_workers(options, run, config)
    devices = devices_of(config.device)
    count = len(devices) if options.count == "auto" else options.count
    if count > 1:
        return process_workers(count, devices, run, config)
    if len(devices) > 1:
        run.log(f"note: one of {len(devices)} accelerators is used; --workers auto uses them all")

    def make(check: Callable[[], None], progress: BatchProgress) -> Evaluator:
        phase("preparing the items")
        live = None if opened is None else opened.take_live()
        evaluator = Evaluator(config, models, task_set, check, run.log, run.folder / "cache", progress, live=live)
        phase("measuring the sources")
        evaluator.prepare(run.manifest()["inputs"])
        return evaluator

    return [LocalWorker(make, devices[0], stop)]


def process_workers(count: int, devices: list[str], run: Run, config: SearchConfig) -> list[Worker]:
    """Workers in processes of this machine, spread evenly over its devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // count) if devices == ["cpu"] else None
    names = [devices[k % len(devices)] for k in range(count)]
    setup = setup_of(run, config)
    shares = {d: Share(names.count(d), count) for d in devices}
    setups = [replace(setup, share=shares[d]) for d in names]
    return [
        ProcessWorker(s, d, threads, log_file_of(run, k), run.log)
        for k, (s, d) in enumerate(zip(setups, names, strict=True))
    ]


def ray_workers(options: WorkerOptions, run: Run, config: SearchConfig) -> list[Worker]:
    """Workers on a Ray cluster.  EvomergeError if the cluster cannot be reached or has too few places."""
    assert options.ray is not None, "the options name a cluster"
    connect_ray(options.ray)
    from evomerge.search.workers.ray_cluster import most_on_one_machine, worker_count
    from evomerge.search.workers.ray_worker import RayWorker

    count = worker_count(config.device, options.count)
    # Ray shows every worker its own accelerator alone, and does not say beforehand how many workers share a machine.
    device = "cuda" if config.device.startswith("cuda") else config.device
    setup = setup_of(run, config.model_copy(update={"device": device}))
    setup = replace(setup, share=Share(host=most_on_one_machine(count)))
    return [RayWorker(setup, run.log) for _ in range(count)]


def device_kind(options: WorkerOptions, config: SearchConfig) -> str:
    """The kind of device on which the workers will compute: `cpu` or `cuda`."""
    if options.ray is None:
        return resolve_device(config.device).type
    connect_ray(options.ray)
    from evomerge.search.workers.ray_cluster import cluster_device

    return cluster_device(config.device)


def connect_ray(address: str) -> None:
    """Connect to the Ray cluster, once."""
    if address == "local":
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported: it then keeps to 127.0.0.1
    from evomerge.search.workers.ray_cluster import connect

    connect(address)


def devices_of(wanted: str) -> list[str]:
    """The names of the devices of this machine that a configuration's `device` allows."""
    device = resolve_device(wanted)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    return [str(device)]


def setup_of(run: Run, config: SearchConfig) -> WorkerSetup:
    """The setup of workers outside this process.  They get no database URL and so no password."""
    told = config.model_copy(update={"storage": None, "on_finish": None})
    manifest, files = run.manifest(), model_stamps(model_folders(config))
    return WorkerSetup(told, run.folder.resolve(), platform.node(), files, manifest["inputs"], manifest["items"])


def log_file_of(run: Run, number: int) -> Path:
    """The file for what the process of worker `number` prints."""
    (run.folder / "workers").mkdir(exist_ok=True)
    return run.folder / "workers" / f"{number}.txt"
