"""nearswap: take over small changes, and of large ones no more than t (alchemonaut 2024, the model card of
QuartetAnemoi-70B; mergekit `nearswap`).

    out = b + clamp(d, -t, t),     d = x - b

Of several sources each is merged into the result of those before it, in their order, with that result as its b.

mergekit writes this as an interpolation, w x + (1 - w) b = b + w d with w = clamp(t / |d|, 0, 1).  Where |d| <= t, w is
1 and b + d remains; where |d| > t, w d is t with the sign of d: the clamp.

Different from mergekit: its |d| is at least 1e-6 in t / |d|, so that at t < 1e-6 the smallest changes are scaled by
t / 1e-6 and not taken over; the results differ by less than 1e-6.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Clip


def plan(knobs: Knobs, measured: Measured) -> Clip:
    """The largest change that is taken over."""
    return Clip(knobs.shared["t"])


METHOD = Method("nearswap", {"t": Knob(None, 0.0)}, plan, in_turn=True, ordered=2)
