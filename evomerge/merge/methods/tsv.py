"""tsv: keep each source's strongest singular directions and make them orthogonal (TSV-Merge: Gargiulo et al. 2025).

For the matrix of a layer, with N sources:  D_i = U_i S_i V_i^T, the k = min(m, n) // N largest singular triplets of
the task vector, after the U of all sources together, and the V, were replaced by the nearest matrix with orthonormal
columns (`spectral.py`).

    out = b + lambda * sum_i w_i D_i          vectors, embeddings and the head: b + lambda * sum_i w_i (x_i - b) / N

With all weights 1 this is the paper's method; vectors are averaged as there.  Embeddings and the head are averaged
too (the paper's models have none that were tuned): their rows are tokens, which no rotation should mix.
Not in mergekit 0.1.5.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend, Derived


def plan(knobs: Knobs, measured: Measured) -> Blend | Derived:
    """Coefficients lambda w_i of the orthogonalised parts, or lambda w_i / N of the task vectors."""
    coefficients = tuple(knobs.shared["lambda"] * w for w in knobs.each["weight"])
    if measured.is_layer_matrix:
        return Derived("tsv", coefficients)
    return Blend(tuple(c / len(coefficients) for c in coefficients), of_task_vectors=True)


METHOD = Method("tsv", {"weight": Knob(1.0, each=True), "lambda": Knob(1.0)}, plan, keeps_parent=False)
