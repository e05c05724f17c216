"""iso_c: give every direction of the summed task vectors the same strength (Iso-C: Marczak et al. 2025).

For the matrix of a layer:  U S V^T the singular value decomposition of sum_i (x_i - b),  D = mean(S) U V^T.

    out = b + lambda * D          vectors, embeddings and the head: b + lambda * mean_i (x_i - b)

Embeddings and the head are averaged like vectors (see `tsv`).  Not in mergekit 0.1.5.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend, Derived


def plan(knobs: Knobs, measured: Measured) -> Blend | Derived:
    """The coefficient lambda of the isotropic matrix, or lambda / N of each task vector."""
    scale = knobs.shared["lambda"]
    if measured.is_layer_matrix:
        return Derived("iso_c", (scale,))
    count = measured.count
    return Blend((scale / count,) * count, of_task_vectors=True)


METHOD = Method("iso_c", {"lambda": Knob(1.0)}, plan)
