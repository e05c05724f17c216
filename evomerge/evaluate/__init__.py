"""From a live model to item scores: tasks are prepared once, a candidate costs only its forwards."""
