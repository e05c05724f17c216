"""What a running search shows to its user.

- `monitor.py`: collects what the driver reports.
- `incumbent.py`: the scores and coefficients of the best trial.
- `trackers.py`: trials as runs of trackio, MLflow or Weights & Biases.
- `snapshot.py`: the state of the search at one moment, drawn in this terminal and read by `status --watch`.
"""
