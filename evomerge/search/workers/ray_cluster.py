"""The Ray cluster: connects to it, and counts how many workers it has place for."""

import os
import signal
import socket
from typing import Any, Literal

from evomerge.errors import EvomergeError

try:
    import ray
    from ray.exceptions import RayError
except ImportError as error:
    raise EvomergeError('--ray needs Ray; install it with: pip install "evomerge[ray]"') from error


def connect(address: str) -> None:
    """Connect to a cluster, or start one on this machine alone (`local`).

    EvomergeError if there is no cluster at the address.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.removeprefix("ray://").strip("[]"), int(port)), timeout=10).close()
        if address == "local":
            ray.init(address="local", **quiet)
        else:
            quiet.pop("include_dashboard")
            ray.init(address=address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvomergeError(f"--ray {address}: no cluster can be reached there ({reason})") from error
    for number, handler in handlers.items():  # Ray replaces them by its own
        signal.signal(number, handler)


def worker_count(device: str, wanted: int | Literal["auto"]) -> int:
    """How many workers run on the cluster: one for each accelerator, or one for each machine where there are none.

    device: of the configuration.
    EvomergeError if the cluster has too few accelerators, or without accelerators too few CPUs, for those wanted.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if device.startswith("cuda") and not gpus:
        raise EvomergeError(f"device: {device!r} was asked for, but the Ray cluster has no GPU")
    on_gpus = gpus > 0 and device != "cpu"
    if wanted == "auto":
        return gpus if on_gpus else sum(bool(node["Alive"]) for node in ray.nodes())
    if wanted > (gpus if on_gpus else cpus):
        has = f"{gpus} GPUs" if on_gpus else f"{cpus} CPUs"
        raise EvomergeError(f"--workers {wanted}: the Ray cluster has {has}, and every worker takes one")
    return wanted


def cluster_device(device: str) -> str:
    """The kind of device that workers get on the cluster, `cpu` or `cuda`.  device: of the configuration."""
    return "cuda" if ray.cluster_resources().get("GPU", 0) and device != "cpu" else "cpu"


def most_on_one_machine(count: int) -> int:
    """How many of `count` workers Ray may put on one machine at most.

    A machine gets no more workers than it has accelerators, or CPUs if it has no accelerator.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max([int(found.get("GPU", 0) or found.get("CPU", 1)) for found in alive], default=1)
    return max(1, min(count, most))
