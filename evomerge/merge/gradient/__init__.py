"""The derivative of a loss by every coefficient of a recipe, from an ordinary backward pass on the live model.

A plan makes each merged tensor W from the source tensors and a few numbers n_j, and a planner makes these numbers from
the coefficients (knobs) k.  So with G = dL/dW:

    dL/dk = sum over tensors, sum_j <G, dW/dn_j> dn_j/dk

    chain.py             dn_j/dk: which knobs have a derivative, and differences of the planner in float64
    inner_products.py    <G, dW/dn_j> for every kind of plan
    low_rank.py          the same without G, where all sources are LoRA adapters of a linear layer
    taps.py              hooks on the live model, and the sum over tensors

Masks and elections of a sparse merge stay as they are at the point (straight-through): almost everywhere they do not
change with a weight.  The rounding of merged weights to the recipe's dtype is ignored.

Letters: T tokens, N sources, R the sum of the adapters' ranks, n the numbers of a plan.
"""

from evomerge.merge.gradient.chain import learnable
from evomerge.merge.gradient.taps import KnobGradient, KnobTaps

__all__ = ["KnobGradient", "KnobTaps", "learnable"]
