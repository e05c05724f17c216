"""The search configuration: one YAML file, checked as a whole before anything is loaded.

- `schema.py`: all keys, their types and defaults, and the checks of single values; of the sections:
  `space.py`: what is searched; `tasks.py`: tasks, guards and splits; `running.py`: how the search runs
- `strict.py`: the base of all these classes
- `config_file.py`: read the file, check it, write it
- `start_from.py`: what it takes from a recipe or an earlier run
- `problems.py`, `method_problems.py`: the checks that need several keys, or the disk
- `error_lines.py`: pydantic's errors, readable
- `differences.py`: two configurations compared
- `paths.py`: paths are made absolute, checked, and pinned to commits of the hub
- `database_url.py`: passwords in database URLs
"""
