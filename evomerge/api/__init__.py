"""The public functions of `evomerge`, which the command line calls too.

    run.py       Run, Trial, open_run: what a run folder holds
    search.py    search, resume
    merge.py     merge: a model folder, or a live model; reproduce
    evaluate.py  evaluate; gather_statistics

`inspect` is in report/inspection.py.  With `show`, these functions print what the command prints.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn when a worker process is started
