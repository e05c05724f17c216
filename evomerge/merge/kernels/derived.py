"""Tensors made of the sources by linear algebra, in minutes: made once, kept in a folder, mapped from there."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evomerge.files import written_aside
from evomerge.merge.kernels import regression, spectral
from evomerge.merge.kernels.compiled import machine_features
from evomerge.merge.measure.statistics_file import StatisticsFile
from evomerge.merge.methods.plan import Derived


def derive(
    plan: Derived, name: str, base: Tensor, sources: Sequence[Tensor], statistics: Sequence[StatisticsFile] = ()
) -> list[Tensor]:
    """The D_j of a plan for the tensor `name`, float32 on the CPU."""
    if base.numel() == 0:
        return [base.float().cpu() for _ in plan.coefficients]
    with threads(1):  # the order in which a library sums depends on how many there are
        if plan.kind == "tsv":
            return spectral.singular_parts(base, sources)
        if plan.kind == "iso_c":
            return spectral.isotropic(base, sources)
        alpha, *weights = plan.settings
        grams = [g.read(name) for g in statistics]
        return [regression.regression_mean(base, sources, grams, weights, alpha, statistics[0].is_transposed(name))]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch while this lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def derived_key(kind: str, operands: Sequence[Tensor]) -> str:
    """A name for what a kind of algebra makes of these bytes on this kind of machine."""
    digest = hashlib.sha256(f"{kind} {machine_features()}".encode())
    for code in (spectral.__file__, __file__):
        digest.update(Path(code).read_bytes())
    for x in operands:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def kept(folder: Path, key: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The tensors that `folder` holds under `key`, memory-mapped; made and written there if it does not.

    A file appears under its name only when it is whole; one that cannot be read is made again.
    """
    file = folder / f"{key}.safetensors"
    if file.exists():
        try:
            return mapped(file)
        except (SafetensorError, OSError):
            file.unlink(missing_ok=True)
    tensors = make()
    with written_aside(file) as aside:
        save_file({str(j): x.contiguous() for j, x in enumerate(tensors)}, aside)
    return mapped(file)


def mapped(file: Path) -> list[Tensor]:
    with safe_open(str(file), framework="pt") as handle:
        return [handle.get_tensor(str(j)) for j in range(len(handle.keys()))]
