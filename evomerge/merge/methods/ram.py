"""ram and ramplus_tl: add what one source changed, average what several did (arXiv 2601.13572; mergekit the same).

"Reinforced Agent Merging".  A source changed an element if |d_i| > epsilon; there m_i is 1, elsewhere 0.

    out = b + sum_i a_i m_i d_i / sum_i m_i

with a_i = 1 where several sources changed the element.  Where only source i did, ram has a_i = 1 too, and ramplus_tl
(tensor by tensor) compensates what averaging takes from a source that shares many of its changes:

    a_i = 1 + r * min(alpha, shared_i / alone_i)

shared_i and alone_i are the numbers of elements that source i changed together with others, and alone.
"""

from dataclasses import replace

import numpy as np

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import SparseBlend

EPSILON = Knob(1e-5, 0.0, smooth=False)


def plan(knobs: Knobs, measured: Measured) -> SparseBlend:
    """Floors just above epsilon; normalising by weights of 1 is averaging."""
    count = measured.count
    floor = float(np.nextafter(np.float32(knobs.shared["epsilon"]), np.float32(np.inf)))
    return SparseBlend((1.0,) * count, keep="magnitude", floors=(floor,) * count, normalize=True)


def plan_plus(knobs: Knobs, measured: Measured) -> SparseBlend:
    """The plan of ram, and gains for elements that one source changed alone."""
    r, alpha = knobs.shared["r"], knobs.shared["alpha"]
    counts = measured.changed(knobs.shared["epsilon"])
    alone = tuple(1.0 + r * min(alpha, shared / own) if own else 1.0 for own, shared in counts)
    return replace(plan(knobs, measured), alone=alone)


RAM = Method("ram", {"epsilon": EPSILON}, plan)
PLUS = Method("ramplus_tl", {"epsilon": EPSILON, "r": Knob(0.1), "alpha": Knob(0.2, 0.0)}, plan_plus)
