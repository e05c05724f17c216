"""The matrices of a `Derived` plan: computed by linear algebra in minutes, kept in a folder, mapped from there."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evomerge.files.write import written_aside
from evomerge.merge.kernels import regression, spectral
from evomerge.merge.kernels.compiled import machine_features
from evomerge.merge.measure.statistics_file import StatisticsFile
from evomerge.merge.methods.plan import Derived


def derive(
    plan: Derived, name: str, base: Tensor, sources: Sequence[Tensor], statistics: Sequence[StatisticsFile] = ()
) -> list[Tensor]:
    """The matrices D_j of a plan for the tensor `name`, float32 on the CPU.

    base, sources: (out, in), or any shape without elements.
    statistics: those of the sources, for `regmean`.
    """
    if base.numel() == 0:
        return [base.float().cpu() for _ in plan.coefficients]
    with threads(1):  # the order in which a library sums depends on their number
        if plan.kind == "tsv":
            return spectral.singular_parts(base, sources)
        if plan.kind == "iso_c":
            return spectral.isotropic(base, sources)
        alpha, *weights = plan.settings
        grams = [g.read(name) for g in statistics]
        return [regression.regression_mean(base, sources, grams, weights, alpha, statistics[0].is_transposed(name))]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this many threads inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def derived_key(kind: str, operands: Sequence[Tensor]) -> str:
    """A name for the matrices of a kind (`Derived.kind`): it depends on the operands' bytes, code and machine."""
    digest = hashlib.sha256(f"{kind} {machine_features()}".encode())
    for code in (spectral.__file__, __file__):
        digest.update(Path(code).read_bytes())
    for x in operands:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def cached(folder: Path, key: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The tensors that `folder` holds under `key`, memory-mapped; `make` computes them if there are none.

    A file gets its name only when it is complete; one that cannot be read is made again.
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
    """The tensors of a file of `cached`, memory-mapped."""
    with safe_open(str(file), framework="pt") as handle:
        return [handle.get_tensor(str(j)) for j in range(len(handle.keys()))]
