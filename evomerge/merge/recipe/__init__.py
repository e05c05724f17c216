"""The recipe: a complete description of one merge.

recipe.py          the recipe and its file
coefficients.py    a coefficient per layer, component or tensor name, and its number for one tensor
slices.py          which layers of which models form the output
layout.py          the tensors of the output, and which tensor of each model goes into each of them
sliced_config.py   the configuration of an output that slices describe
inputs.py          commits and SHA-256 sums of the models that a recipe names
open_bank.py       opens the models of a recipe
nested.py          a source that is a recipe itself
"""
