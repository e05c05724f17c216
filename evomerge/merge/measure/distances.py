"""How far sources are from their base, how alike their task vectors are, and where they pull against each other."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.measure.gram import gram_matrix
from evomerge.sources.open_models import Models
from evomerge.sources.tensor_names import layer_count, tensor_role

STRANGE = 0.7  # two independent models of one size are 1.41 apart, fine-tunes mostly below 0.1
ALL = "all"  # the column of all components together
STRONG = 0.2  # the share of a tensor's elements that count as strongly changed, as in TIES (Yadav et al. 2023)
LARGEST = (0.1, 0.2, 0.5)  # shares of a tensor's elements whose part of the squared norm is measured
EXACT = 1 << 22  # elements of each tensor that are looked at; of larger ones as many at random, which err by 0.2%
SAMPLE = 1 << 16  # elements of each tensor that are sorted; the standard error of a share of them is 0.2%
SEED = 0

Measures = dict[str, dict[str, float | None]]
"""Source -> component or source -> a number."""


@dataclass(frozen=True)
class Differences:
    """How sources differ from their base and from each other.

    distances: source -> component -> the length of its task vector as a share of the base's; None where the base is 0.
    by_layer: source -> layer -> the same of the layer's matrices (norms would hide them: they are long and hardly
        change); empty if not all layers were looked at.
    cosines: source -> source -> the cosine between their task vectors; None if one is 0.
    conflicts: (source, source) -> component, or `all` -> of the elements that belong to the most changed fifth of their
        tensor in both, the share with opposite signs; unrelated task vectors have 0.5.  None if there is no such one.
    redundancy: source -> 10%, 20%, 50% -> the part of the task vector's squared norm that so many of each tensor's
        elements carry, the most changed ones; None if the source is the base.
    sampled: whether some tensors are so large that a sample was measured: EXACT of their elements, for conflicts and
        redundancy SAMPLE.
    """

    distances: Measures
    by_layer: dict[str, list[float | None]]
    cosines: Measures
    conflicts: dict[tuple[str, str], dict[str, float | None]]
    redundancy: Measures
    sampled: bool


def measure(
    models: Models,
    layers: Container[int] | None = None,
    sample: int = SAMPLE,
    progress: Callable[[int], None] = lambda count: None,
) -> Differences:
    """Measure all differences in one pass, tensor by tensor.

    layers: look at the tensors of these layers only; None looks at all tensors, which reads every model from the disk.
    sample: elements of each tensor for conflicts and redundancy; with 0 they are not measured.
    progress: gets the number of the base's bytes that are done.
    """
    sources = list(models.sources)
    pairs = list(combinations(sources, 2))
    kinds = [*sorted({tensor_role(n).component for n in models.base.tensors}), ALL]
    depth = layer_count(list(models.base.tensors))
    zeros = (len(sources) + 1, len(sources) + 1)
    grams = {kind: np.zeros(zeros) for kind in kinds}  # of the base and the task vectors, (1 + N, 1 + N)
    in_layer = [np.zeros(zeros) for _ in range(depth)]
    both, opposed = ({(pair, kind): 0.0 for pair in pairs for kind in kinds} for _ in range(2))
    carried, squares = {(s, share): 0.0 for s in sources for share in LARGEST}, dict.fromkeys(sources, 0.0)
    sampled, done = False, 0
    for name, info in models.base.tensors.items():
        role = tensor_role(name)
        if not info.dtype.is_floating_point or not (layers is None or role.layer in layers):
            continue
        flat = [model.read(name).reshape(-1) for model in (models.base, *models.sources.values())]
        count = flat[0].numel()
        flat = some_elements(flat, EXACT)
        changes = with_changes(flat)
        gram = gram_matrix(changes) * (count / changes[0].numel())
        for total in (grams[role.component], grams[ALL]):
            total += gram
        if role.layer is not None and role.component != "norm":
            in_layer[role.layer] += gram
        progress(done := done + info.bytes)
        if sample == 0:
            continue
        sampled |= count > sample
        changes = some_elements(changes[1:], sample)
        each = count / changes[0].numel()  # elements that one of the sample stands for
        strong = []
        for s, change in zip(sources, changes, strict=True):
            size, order = change.abs().sort(descending=True)
            running = size.double().square_().cumsum(0)
            for share in LARGEST:
                carried[s, share] += each * float(running[part_of(share, size) - 1])
            squares[s] += each * float(running[-1])
            chosen = torch.zeros_like(change, dtype=torch.bool)
            chosen[order[: part_of(STRONG, size)]] = True
            strong.append(chosen & (change != 0))
        for (i, one), (j, other) in combinations(enumerate(sources), 2):
            shared = strong[i] & strong[j]
            against = shared & (changes[i].signbit() != changes[j].signbit())
            for kind in (role.component, ALL):
                both[(one, other), kind] += each * float(shared.sum())
                opposed[(one, other), kind] += each * float(against.sum())
    return Differences(
        {s: {kind: length(grams[kind], i) for kind in kinds[:-1]} for i, s in enumerate(sources, 1)},
        {s: [length(gram, i) for gram in in_layer] for i, s in enumerate(sources, 1)} if layers is None else {},
        {s: {o: cosine(grams[ALL], i, j) for j, o in enumerate(sources, 1)} for i, s in enumerate(sources, 1)},
        {p: {k: opposed[p, k] / both[p, k] if both[p, k] else None for k in kinds} for p in pairs} if sample else {},
        {s: {f"{x:.0%}": carried[s, x] / squares[s] if squares[s] else None for x in LARGEST} for s in sources}
        if sample
        else {},
        sampled,
    )


def with_changes(flat: Sequence[Tensor]) -> list[Tensor]:
    """The base and what each source adds to it, in float32.  flat: the base and the sources, (n,) each."""
    base = flat[0].float()
    return [base, *(tensor.float() - base for tensor in flat[1:])]


def some_elements(flat: Sequence[Tensor], count: int) -> list[Tensor]:
    """The same `count` elements of each tensor, all if there are no more: one at random of every `count`-th part."""
    size = flat[0].numel()
    if size <= count:
        return list(flat)
    within = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    drawn = ((torch.arange(count, dtype=torch.float64) + within) * (size / count)).long().clamp_(max=size - 1)
    return [tensor[drawn] for tensor in flat]


def part_of(share: float, elements: Tensor) -> int:
    """How many elements a share of them is, at least one."""
    return max(1, round(share * elements.numel()))


def length(gram: np.ndarray, source: int) -> float | None:
    """The length of a task vector as a share of the base's.  gram: of base and task vectors."""
    return float((gram[source, source] / gram[0, 0]) ** 0.5) if gram[0, 0] else None


def cosine(gram: np.ndarray, one: int, other: int) -> float | None:
    """The cosine between two task vectors.  gram: of base and task vectors."""
    lengths = (gram[one, one] * gram[other, other]) ** 0.5
    return float(gram[one, other] / lengths) if lengths else None


def strangers(distances: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The sources that are other models than fine-tunes of the base: a component's change is STRANGE of it or more."""
    return [s for s, shares in distances.items() if any(x is not None and x >= STRANGE for x in shares.values())]
