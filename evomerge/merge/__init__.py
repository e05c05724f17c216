"""From a recipe to weights.

recipe/            recipes, and which tensor of which model goes into which of the output
methods/           planners: from coefficients and measurements to a plan of numbers
measure/           the measurements that planners ask for
bank/              tensors of the base and the sources on a device
tensor_plan.py     one output tensor: its inputs, its plan, the plan's operands
kernels/           from a plan and its operands to a merged tensor
materialise.py     all tensors of a recipe: the only way to merge
live.py            the live model, whose weights every candidate overwrites
gradient/          the derivative of a loss on the live model by every coefficient
compute_dtype.py   the type in which the live model computes
output/            a merged model as a folder
mergekit/          mergekit's files, read and written
"""
