"""The study in its database: its trials with their records, and the lease of the one process that works on it.

A write goes through three layers:
study.py: the trials of a search and their sampler; decides what is stored.
database.py: one transaction for each write, repeated while the database's server is gone.
sql_statements.py: the statements on the rows of Optuna's tables.

What is stored:
trial_record.py: what a finished trial leaves behind beside its parameters and value.
item_scores.py: item scores as text, and the ids of the items that they belong to.
compact.py: how numbers and texts of thousands of trials are held in memory.
answers.py: what models answered to the holdout items, in files of the run folder.

Beside them:
study_lease.py: lets one driver at a time work on a study.
sqlite.py: what a database in a file needs.
optuna_private.py: everything that is not public in Optuna and that evomerge uses.
"""
