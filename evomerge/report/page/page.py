"""report.html: the page, its sections in their order.  One file, no network."""

import time
from collections.abc import Callable

from evomerge.files.write import write_text
from evomerge.printable import printable
from evomerge.report.page.answers import answers_section
from evomerge.report.page.closing import cost_section, use_section
from evomerge.report.page.conflicts import conflicts_section
from evomerge.report.page.front import front_section
from evomerge.report.page.importance import importance_section
from evomerge.report.page.landscape import landscape_section
from evomerge.report.page.material import Material, gather
from evomerge.report.page.parts import whole_page
from evomerge.report.page.progress import progress_section
from evomerge.report.page.scores import scores_section
from evomerge.report.page.verdict import verdict_section
from evomerge.report.page.winner import winner_section
from evomerge.report.status import Status
from evomerge.search.run import Run

RELOAD = 60  # seconds after which a page of a running search is written and read again

SECTIONS = (
    ("verdict", "Verdict", verdict_section),
    ("scores", "Scores", scores_section),
    ("answers", "Answers", answers_section),
    ("progress", "Search", progress_section),
    ("winner", "Recipe", winner_section),
    ("importance", "Coefficients", importance_section),
    ("landscape", "Landscape", landscape_section),
    ("conflicts", "Conflicts", conflicts_section),
    ("front", "Front", front_section),
    ("cost", "Cost", cost_section),
    ("use", "Use", use_section),
)
"""Name, title in the list of contents, and function of each section; a function returns "" where it has nothing."""


def write_report(run: Run) -> Status:
    """Write report.html; of a run without a verdict what there is so far.  Returns the status that it shows."""
    material = gather(run)
    write_text(run.report_file, printable(page(material)))
    return material.status


class PageSoFar:
    """Writes the report of a running search now and then.

    The page takes longer the more trials there are; it gets at most 2% of the time.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self.clock = clock
        self.due = clock() + RELOAD

    def refresh(self) -> None:
        """Write the page if it is due.  An error is logged: a search does not end because of its report."""
        if (begun := self.clock()) < self.due:
            return
        try:
            write_report(self.run)
        except Exception as error:
            self.run.log(f"note: report.html cannot be written now ({type(error).__name__}: {error})")
        self.due = self.clock() + max(RELOAD, 50 * (self.clock() - begun))


def page(material: Material) -> str:
    """The HTML of the report."""
    name = material.status.config.name
    made = [(key, title, content) for key, title, make in SECTIONS if (content := make(material))]
    return whole_page(name, name, made, script=True, reload=None if material.verdict else RELOAD)
