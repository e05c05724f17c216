"""The output of `evomerge inspect`: size and compatibility of the models, and how far the sources are from the base."""

import numpy as np
from rich.table import Table

from evomerge.merge.measure.gram import gram_matrix
from evomerge.report.progress import console
from evomerge.sources.open_models import Models
from evomerge.sources.tensor_names import layer_count, tensor_role


def print_inspection(models: Models) -> bool:
    """Print what was found; return whether the models can be merged."""
    base = models.base
    names = list(base.tensors)
    parameters = sum(int(np.prod(t.shape)) for t in base.tensors.values())
    console.print(
        f"base: {base.config.get('model_type')}, {parameters / 1e6:.1f}M parameters, {layer_count(names)} layers, "
        f"{len(names)} tensors"
    )
    for note in models.compatibility.notes:
        console.print(f"note: {note}", markup=False)
    for problem in models.compatibility.problems:
        console.print(f"problem: {problem}", markup=False)
    if models.compatibility.problems:
        console.print("these models cannot be merged")
        return False
    console.print(distance_table(models))
    console.print("these models can be merged")
    return True


def distance_table(models: Models) -> Table:
    """The table of distances, one row per source.

    Columns `|d|/|b|`: the norm of the task vector d divided by the norm of the base b, by component.
    Columns `cos`: the cosine between two task vectors; near 0 the two changes are independent, near 1 they are alike.
    """
    sources = list(models.sources)
    components = sorted({tensor_role(n).component for n in models.base.tensors})
    squares = {(s, c): 0.0 for s in sources for c in components}
    base_squares = dict.fromkeys(components, 0.0)
    products = np.zeros((len(sources), len(sources)))
    for name, info in models.base.tensors.items():
        if not info.dtype.is_floating_point:
            continue
        base = models.base.read(name)
        deltas = [models.sources[s].read(name).float() - base.float() for s in sources]
        gram = gram_matrix([base, *deltas])
        component = tensor_role(name).component
        base_squares[component] += gram[0, 0]
        products += gram[1:, 1:]
        for i, s in enumerate(sources):
            squares[s, component] += gram[i + 1, i + 1]
    table = Table("source", *(f"|d|/|b| {c}" for c in components), *(f"cos {s}" for s in sources))
    for i, s in enumerate(sources):
        shares = [f"{(squares[s, c] / base_squares[c]) ** 0.5:.2%}" if base_squares[c] else "-" for c in components]
        lengths = np.sqrt(products[i, i] * products.diagonal())
        cosines = [f"{p / n:+.2f}" if n else "-" for p, n in zip(products[i], lengths, strict=True)]
        table.add_row(s, *shares, *cosines)
    return table
