"""A coefficient from its values: given the number at every tensor, the shortest coefficient that has them.

Both ways of a mergekit file end here.  The two programs agree on filters by parts of names and on lists along the
depth; they differ in what a list means outside the stack (`Depth`), so what differs there is named tensor by tensor.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from evomerge.merge.recipe.coefficients import Coefficient, FilteredValue, PerLayer
from evomerge.sources.tensor_names import TensorRole, coefficient_layer, tensor_role

Values = Mapping[str, float]
"""Tensor name -> the number a coefficient has there."""
Depth = Callable[[TensorRole, int], int]
"""(place, layers) -> which number of a per-layer list a tensor takes."""


def coefficient(values: Values, filters: Sequence[str], layers: int, depth: Depth = coefficient_layer) -> Coefficient:
    """A coefficient that has these values, by the filters in their order as far as that goes.

    Tensors for which that gives another value are named in full, before everything else.  A longer name stands before
    a shorter one, which may be a part of it.
    """
    exact: dict[str, float] = {}
    while True:
        parts = [FilteredValue(filter=n, value=exact[n]) for n in sorted(exact, key=lambda n: (-len(n), n))]
        rest = {n: v for n, v in values.items() if not any(p.filter in n for p in parts if p.filter)}
        for name in dict.fromkeys(filters):
            if claimed := {n: v for n, v in rest.items() if name in n}:
                parts.append(FilteredValue(filter=name, value=along(claimed, layers, depth)))
                rest = {n: v for n, v in rest.items() if n not in claimed}
        parts.append(FilteredValue(value=along(rest, layers, depth)))
        wrong = {n: v for n, v in values.items() if value_of(parts, n, layers, depth) != v}
        if not wrong:
            break
        exact |= wrong
    while len(parts) > 1 and parts[-2].value == parts[-1].value:
        del parts[-2]
    return parts[0].value if len(parts) == 1 else parts


def along(values: Values, layers: int, depth: Depth) -> PerLayer:
    """What most of the tensors have: one number, or one per layer.  A layer without any takes its neighbour's."""
    seen: dict[int, Counter[float]] = {}
    for name, value in values.items():
        where = tensor_role(name)
        if where.layer is not None:
            seen.setdefault(depth(where, layers), Counter())[value] += 1
    if not seen:
        return Counter(values.values()).most_common(1)[0][0] if values else 0.0
    known = {layer: count.most_common(1)[0][0] for layer, count in seen.items()}
    if len(set(known.values())) == 1:
        return next(iter(known.values()))
    return [known[min(known, key=lambda at: (abs(at - layer), at))] for layer in range(layers)]


def value_of(parts: Sequence[FilteredValue], name: str, layers: int, depth: Depth) -> float:
    value = next(p.value for p in parts if p.filter is None or p.filter in name)
    return value[depth(tensor_role(name), layers)] if isinstance(value, list) else value
