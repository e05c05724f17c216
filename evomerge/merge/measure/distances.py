"""How far sources are from their base, and how alike their task vectors are."""

from collections.abc import Container, Mapping

import numpy as np

from evomerge.merge.measure.gram import gram_matrix
from evomerge.sources.open_models import Models
from evomerge.sources.tensor_names import tensor_role

STRANGE = 0.7  # two independent models of one size are 1.41 apart, fine-tunes mostly below 0.1

Measures = dict[str, dict[str, float | None]]
"""Source -> component or source -> a number."""


def measure(models: Models, layers: Container[int] | None = None) -> tuple[Measures, Measures]:
    """Source -> component -> the length of its task vector as a share of the base's, None where the base is 0; and
    source -> source -> the cosine between their task vectors, None if one is 0.

    layers: look at the tensors of these layers only; None looks at all tensors, which reads every model from the disk.
    """
    sources = list(models.sources)
    components = sorted({tensor_role(n).component for n in models.base.tensors})
    squares = {(s, c): 0.0 for s in sources for c in components}
    base_squares = dict.fromkeys(components, 0.0)
    products = np.zeros((len(sources), len(sources)))  # (N, N)
    for name, info in models.base.tensors.items():
        if not info.dtype.is_floating_point or not (layers is None or tensor_role(name).layer in layers):
            continue
        base = models.base.read(name)
        deltas = [models.sources[s].read(name).float() - base.float() for s in sources]
        gram = gram_matrix([base, *deltas])
        component = tensor_role(name).component
        base_squares[component] += gram[0, 0]
        products += gram[1:, 1:]
        for i, s in enumerate(sources):
            squares[s, component] += gram[i + 1, i + 1]
    distances: Measures = {}
    cosines: Measures = {}
    for i, s in enumerate(sources):
        shares = {c: (squares[s, c] / base_squares[c]) ** 0.5 if base_squares[c] else None for c in components}
        lengths = np.sqrt(products[i, i] * products.diagonal())
        distances[s] = {c: None if share is None else float(share) for c, share in shares.items()}
        cosines[s] = {o: float(p / n) if n else None for o, p, n in zip(sources, products[i], lengths, strict=True)}
    return distances, cosines


def strangers(distances: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The sources that are other models than fine-tunes of the base: a component's change is STRANGE of it or more."""
    return [s for s, shares in distances.items() if any(x is not None and x >= STRANGE for x in shares.values())]
