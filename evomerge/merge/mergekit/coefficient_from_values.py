"""From the number that a coefficient has for every tensor to the shortest coefficient that has these numbers.

Used in both directions.  mergekit and evomerge read filters by parts of names and lists along the layers alike, but
a list means different numbers for tensors outside the layers (`LayerOf`).  Tensors for which the two differ get an
entry of their own.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from evomerge.merge.recipe.coefficients import Coefficient, FilteredValue, PerLayer
from evomerge.sources.tensor_names import TensorRole, coefficient_layer, tensor_role

Values = Mapping[str, float]
"""Tensor name -> the number that a coefficient has there."""
LayerOf = Callable[[TensorRole, int], int]
"""(role, number of layers) -> the index of the number that a tensor takes from a list of one number per layer."""


def shortest_coefficient(
    values: Values, filters: Sequence[str], layers: int, layer_of: LayerOf = coefficient_layer
) -> Coefficient:
    """The shortest coefficient that has these values.

    filters: parts of names that may tell the tensors apart, in the order in which they are tried.
    layers: the number of layers.

    Tensors that would get another value get an entry with their full name, before all others.  A longer name comes
    before a shorter one, which may be a part of it.
    """
    exact: dict[str, float] = {}
    while True:
        entries = [FilteredValue(filter=n, value=exact[n]) for n in sorted(exact, key=lambda n: (-len(n), n))]
        rest = {n: v for n, v in values.items() if not any(e.filter in n for e in entries if e.filter)}
        for name in dict.fromkeys(filters):
            if claimed := {n: v for n, v in rest.items() if name in n}:
                entries.append(FilteredValue(filter=name, value=usual_value(claimed, layers, layer_of)))
                rest = {n: v for n, v in rest.items() if n not in claimed}
        entries.append(FilteredValue(value=usual_value(rest, layers, layer_of)))
        wrong = {n: v for n, v in values.items() if value_from_entries(entries, n, layers, layer_of) != v}
        if not wrong:
            break
        exact |= wrong
    while len(entries) > 1 and entries[-2].value == entries[-1].value:
        del entries[-2]
    return entries[0].value if len(entries) == 1 else entries


def usual_value(values: Values, layers: int, layer_of: LayerOf) -> PerLayer:
    """The value that most of the tensors have: one number, or a list of one number per layer.

    A layer without tensors gets the number of the nearest layer that has some.
    """
    seen: dict[int, Counter[float]] = {}
    for name, value in values.items():
        role = tensor_role(name)
        if role.layer is not None:
            seen.setdefault(layer_of(role, layers), Counter())[value] += 1
    if not seen:
        return Counter(values.values()).most_common(1)[0][0] if values else 0.0
    known = {layer: count.most_common(1)[0][0] for layer, count in seen.items()}
    if len(set(known.values())) == 1:
        return next(iter(known.values()))
    return [known[min(known, key=lambda at: (abs(at - layer), at))] for layer in range(layers)]


def value_from_entries(entries: Sequence[FilteredValue], name: str, layers: int, layer_of: LayerOf) -> float:
    """The number that entries by tensor name give the tensor called `name`."""
    value = next(e.value for e in entries if e.filter is None or e.filter in name)
    return value[layer_of(tensor_role(name), layers)] if isinstance(value, list) else value
