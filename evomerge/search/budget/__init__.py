"""When a search ends, and what it uses.

- `limits.py`: the limits of trials, time, score and patience, as pure functions.
- `running.py`: the limits of a search that runs; `enough.py`: whether its time is enough, in words.
- `reserve.py`: the time that a search keeps for judging its finalists and writing the result.
- `usage.py`: time, tokens, memory and energy, added up; `meter.py`: measures them for one job.
"""
