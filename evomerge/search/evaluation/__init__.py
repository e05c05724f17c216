"""From a recipe to item scores: tasks, jobs, the evaluator of one device, races."""
