"""report.html, in plain HTML and SVG.

- `page.py`: the order of the sections; `material.py`: what they are made of.
- One file a section: `verdict.py`, `scores.py`, `answers.py`, `progress.py`, `winner.py`, `importance.py`,
  `landscape.py`, `conflicts.py`, `front.py`, `closing.py` (cost and use).
- `parts.py`, `svg.py`: pieces of HTML, charts; `style.css`, `script.js`: colours and layout, copying and filtering.
"""

from evomerge.report.page.page import PageSoFar, write_report

__all__ = ["PageSoFar", "write_report"]
