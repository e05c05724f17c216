"""The end of a search: which model is the best, and is its lead more than luck?

finals.py: what a search has found is chosen, judged and written down.
finalists.py: which models are scored on the selection split; selection.py: which of them becomes the candidate.
verdict.py: the statistical test and its outcome in words.
intervals.py: the confidence intervals that the test uses.
guards.py: whether a model keeps the guards.
next_step.py: the command that follows from the outcome.
verdict_file.py: verdict.json, written and checked.
simplify.py: fewer sources and coefficients, by steps that no_loss.py allows.
front.py: the Pareto front of the tasks, its hypervolume and its knee.
choices.py: another finalist than the verdict's, chosen later.
conflicts.py, landscape.py: what the report shows of the sources, and of the models around the candidate.
recommended.py: which recipe of a run is exported.

Shapes: N items, C models that are compared.
"""
