"""Draw the pictures of the documentation, and print the numbers beside them: python docs/pictures.py [PART ...]

    methods   docs/pictures/methods/   what every merge method does                              seconds
    merging   docs/pictures/merging/   when merging works, measured on the tiny family           two minutes
    compare   no picture: the table of explanation/choose-a-method.md                            five minutes
    memory    no picture: the tables of how-to/memory-and-time.md                                seconds
    search    docs/pictures/search/    the winner's curse; racing and gradient in a real search  two minutes

Without a part all of them are drawn.  The tiny family is made in runs/tiny if it is not there.
"""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PARTS = ("methods", "merging", "compare", "memory", "search")

if __name__ == "__main__":
    parts = sys.argv[1:] or PARTS
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"{', '.join(sorted(unknown))}: not one of {', '.join(PARTS)}")
    sys.path.insert(0, str(DOCS / "tools"))
    root = DOCS.parent
    if set(parts) - {"methods", "memory"}:
        subprocess.run([sys.executable, root / "examples" / "tiny" / "make.py", root / "runs" / "tiny"], check=True)
    for part in parts:
        import_module(part).draw(DOCS / "pictures" / part)
