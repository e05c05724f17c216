"""From a recipe to item scores.

- `task_set.py`: the tasks of a search and the items of each split.
- `jobs.py`: what the driver asks a worker to do, and what comes back.
- `evaluator.py`: does a job on one device: merge, check, score.  `open_device.py`: opens what it works with.
- `split_workloads.py`: the items that it scores; `trial_scorer.py`: all of them, or chunk by chunk in a race.
- `score_checks.py`: refuses item scores that are not finite.
- `scale.py`: from item scores to the value of a trial; `settled_scale.py`: what 0 and 1 are in a study.
- `guards.py`: tasks that must not get worse, and what it costs if they do.
- `agreement.py`: whether objective and metric rank models alike; `agreement_check.py`: asked while a search runs.
- `settled_dtype.py`: the type in which a study computes forwards.
- `race_setup.py`: what all races of a search share; `race_policy.py`: which candidate races, and against which trials.
- `stored_evaluations.py`: scores of models that are not trials, kept in the study.

Shape letter of this package: N items of the search split.
"""
