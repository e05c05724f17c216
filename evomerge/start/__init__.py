"""What a user needs before the first search: a task file of own data (`new_task.py`)."""
