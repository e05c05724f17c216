"""The merge methods, one file each, and what they are made of.  Nothing here sees a tensor.

A method is a planner: from its coefficients (knobs) and from what it asks about one tensor (measurements), it computes
a plan of plain numbers, which `evomerge/merge/kernels` carries out.

    ties.py, slerp.py, ...   a method or a family of methods: formula, source, planner
    method.py                what a method is: name, coefficients, planner
    knobs.py                 a coefficient of a method, and the values of all at one tensor
    measured.py              what a planner may ask about one tensor
    plan.py                  the plans
    density.py               how a density becomes a threshold or the chance of a random mask
    normalization.py         how a sum is divided by the sum of the weights
    rescale.py               what makes up for the elements that a random mask drops
    registry.py              the methods by name: those of this folder, and those of other packages

A new method is a new file with a `METHOD`: the registry finds it by being there.  Where mergekit has a method, its
name, coefficients and meaning are mergekit's.

Letters in formulas: b the base, x_i the sources, d_i = x_i - b the task vectors, w_i the weights, N sources.
"""

from evomerge.merge.methods.registry import Methods, built_in

METHODS: Methods = built_in(__name__, __path__)
"""The methods by name.  `METHODS[name]` also finds those of other packages; iteration gives those that are loaded."""
