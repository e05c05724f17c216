"""A search: an Optuna study over merge coefficients, from the first baseline to the verdict.

session.py: opens models, study and workers, and drives the search.
loop.py: the search, phase by phase.
scored_baselines.py: the baselines of a running search and their values.
trial.py: one trial, from its proposal to its record.
run.py: the run folder.
inputs.py: what a run was made of, recorded and compared.
models.py: the base and the sources of a configuration.
space/: which coefficients may vary, and the baselines.
samplers/: the samplers that propose points.
storage/: the study in its database.
evaluation/: from a recipe to item scores.
workers/: the processes that evaluate.
verdict/: finals, statistical test, intervals.
budget/: when a search ends, and what it has used.
monitor/: what a running search shows.
failures.py: when too many trials fail in a row.
interrupt.py: how a user stops a search.
repeat.py: one finished trial again, alone.
"""
