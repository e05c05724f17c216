"""A look at a search before it begins: what base and sources really answer, what that warns of, and a forecast.

probe.py      a few items of each task, answered by base and sources
answers.py, concerns.py, first_token.py, memory.py, near_duplicates.py
              what is wrong with answers, splits, sources, prompts or limits, each with its mend
forecast.py   how long a trial takes, how many there will be, what memory and disk they need
check.py      all of it
paths.py      the loss between models, for `inspect`
"""
