"""The search configuration: one YAML file, checked as a whole before anything is loaded.

- `schema.py`: the keys, their types and defaults, and the checks of single values
- `config_file.py`: read the file, check what depends on several keys, write it
- `database_url.py`: passwords in database URLs
"""
