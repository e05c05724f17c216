"""The search space: which coefficients may vary, and the recipes that are evaluated before the sampler begins.

space.py: axes and bounds; from a point to a recipe and back.
config_recipe.py: what all recipes of a search have in common.
order.py: the order in which sources are merged.
layer_assembly.py: which source gives each layer; from a point to a recipe and back.
baselines.py: the parents, the uniform blend, recommended recipes and the user's own.
greedy_soup.py: the greedy soup, which needs the parents' scores.
"""
