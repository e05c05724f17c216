"""What a user needs before the first search.

new_task.py      a task file of own data
columns.py       what the columns of the data are
task_content.py  what the task file says
init.py          a configuration with comments
migrate/         a configuration from a search of another program
yaml_text.py     names and paths as the text of a configuration
"""
