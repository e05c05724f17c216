"""What a running search shows to its user.

- `monitor.py`: collects what the driver reports.
- `snapshot.py`: the state of the search at one moment, drawn in this terminal and read by `status --watch`.
"""
