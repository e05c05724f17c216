"""From a recipe to weights.

recipe/            what a recipe says, and which tensor goes where
methods/           planners: from coefficients and measurements to a plan of numbers
measure/           the measurements that planners ask for
bank/              tensors of the base and the sources on a device
tensor_plan.py     one output tensor: its inputs, its plan, the plan's operands
kernels/           from a plan and its operands to a merged tensor
materialise.py     all tensors of a recipe: the only way to merge
live.py            the live model, whose weights every candidate overwrites
compute_dtype.py   the type in which the live model computes
output/            a merged model as a folder
mergekit/          mergekit's files, read and written
"""
