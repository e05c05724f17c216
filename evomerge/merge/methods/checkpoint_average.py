"""checkpoint_average: the mean of the last checkpoints of one run, the newer the heavier if so wished.

    out = sum_i w_i x_i / sum_i w_i          over k sources, ordered from the oldest, i = 1, to the newest, i = k

    w_i = 1                the plain mean: LAWA (Kaddour 2022), SWA (Izmailov et al. 2018); the default
    w_i = decay^(k - i)    an exponential moving average that ends with the newest (Tarvainen and Valpola 2017)
    w_i = i                with `linear` (Lacoste-Julien et al. 2012)

`decay` counts checkpoints, not training steps.  `linear` is a rule of its own: beside a decay below 1 it is refused.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Weights by age, divided by their sum."""
    ages = range(knobs.count - 1, -1, -1)  # the newest is 0 checkpoints old
    linear, decay = bool(knobs.shared["linear"]), knobs.shared["decay"]
    weights = [float(knobs.count - age) if linear else decay**age for age in ages]
    return Blend(tuple(w / sum(weights) for w in weights))


METHOD = Method(
    "checkpoint_average",
    {
        "decay": Knob(1.0, 1e-6, 1.0),  # a smaller one is the newest checkpoint alone, to float32
        "linear": Knob(0.0, 0.0, 1.0, switch=True),
    },
    plan,
    without_base=1,
    excludes={"linear": "decay"},
)
