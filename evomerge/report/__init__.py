"""What the program shows: in the terminal, in report.html, in tables and in the model card.

- `status.py`: reads the state of a run from its folder and its study.
- `terminal.py`: the output of `search`, `resume`, `status` and `evaluate`; `live_view.py`: the view that is redrawn.
- `progress.py`: the progress bar of one long step.
- `html.py`: report.html.
- `verdict_text.py`, `usage_text.py`: a verdict, and what a search has used, in words.
- `studies.py`: the output of `studies`; `item_table.py`: of `items`; `inspection.py`: of `inspect`.
"""
