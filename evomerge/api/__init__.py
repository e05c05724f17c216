"""The public functions of `evomerge`, which the command line calls too.

    run.py            Run, Trial, open_run: what a run folder holds; to_export.py: what is exported of it
    check.py          check: a look at a search before it begins
    search.py         search, resume
    read_config.py    its configuration, from any of its forms; open_inputs.py: its models and tasks
    search_in_run.py  the search in its run folder, up to the report; on_finish.py: who is told of its end
    merge.py          merge: a model folder, or a live model; reproduce.py: the same model again
    lora.py           merges and fine-tunes as adapters; push.py: uploads to the hub
    evaluate.py       evaluate; statistics.py: what `fisher` and `regmean` need

`inspect` is in report/inspection.py.  With `show`, these functions print what the command prints.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn when a worker process is started
