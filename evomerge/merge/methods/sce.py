"""sce: select, calculate, erase (Wan et al. 2024, FuseChat; mergekit `sce`).

Select: keep the `select_topk` share of the elements in which the sources differ most, by the variance of the task
vectors across them (a share of those that differ at all).  Calculate: each source's weight is its mean square over
what was selected.  Erase: elect for every element the sign of the plain sum (0 counts as +), drop the other one.

    out = b + sum_agreeing w_i d_i / sum_agreeing w_i,          w_i = mean(d_i^2) / sum_j mean(d_j^2)

Weights below 1e-6 are 0.  Where the sum of the mean squares is below 1e-6 the weights are equal, as in mergekit: this
holds for models whose elements moved by less than about 1e-3, as in most fine-tunes.  With a single source nothing
varies: if `select_topk` is below 1, the result is the base.

Different from mergekit on purpose: elements that vary as much as the last selected are all kept; a source with less
than a millionth of the energy changes nothing, while mergekit divides what it alone changed by 1e-6 and so keeps a
part.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend, SparseBlend

TINY = 1e-6  # mean squares too small to weigh by, weights too small to divide by


def plan(knobs: Knobs, measured: Measured) -> SparseBlend | Blend:
    """A floor for the variance, weights by energy; the base if nothing is selected."""
    count, selected = measured.count, knobs.shared["select_topk"]
    floor = measured.variance(selected) if selected < 1.0 else 0.0
    if floor is None:
        return Blend((0.0,) * count, of_task_vectors=True)
    squares = measured.mean_squares(floor)
    energy = sum(squares)
    weights = tuple(s / energy for s in squares) if energy >= TINY else (1 / count,) * count
    return SparseBlend(
        weights=tuple(w if w >= TINY else 0.0 for w in weights),
        keep="variance" if selected < 1.0 else "all",
        floors=(floor,) * count,
        elect="plain",
        normalize=True,
    )


METHOD = Method("sce", {"select_topk": Knob(1.0, 0.0, 1.0, smooth=False)}, plan)
