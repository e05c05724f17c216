"""shell: an English request, to be answered by one shell command.

A family is a command and the ways to ask for it; `shell_families.txt` lists them, each command with its
wordings indented below. The slots {file}, {dir}, {n}, ... are filled from the lists here. No wording stands
under two commands, so a prompt has exactly one right answer.
"""

from pathlib import Path
from random import Random

from item import Item

SLOTS = {
    "file": "todo.md sales.csv server.log main.py index.html prices.json diary.txt tox.ini data.tsv app.rs",
    "dir": "src docs photos /var/log /srv/www invoices tests /opt/tools music drafts",
    "word": "error timeout invoice TODO password Berlin failed import total warning",
    "other": "success delay receipt DONE secret Lisbon passed export average notice",
    "ext": "py txt jpg log csv html pdf md bak tmp",
    "host": "alpha.example.com db.example.org 10.0.0.7 backup.example.net web1.example.com",
    "user": "root alice deploy mona git www",
    "process": "nginx firefox postgres redis python java",
    "branch": "main dev hotfix release feature-login cleanup",
    "archive": "old site photos2024 weekly bundle src-copy",
    "link": "latest current shortcut active",
    "key": "EDITOR LANG PAGER API_URL HTTP_PROXY",
}
NUMBERS = range(2, 41)
FRAMES = ("{}", "please {}", "{} - what do I type?", "I want this: {}")


def read_families(path: Path) -> list[tuple[str, list[str]]]:
    """The commands of a family file in order, each with its wordings."""
    families: list[tuple[str, list[str]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            families[-1][1].append(line.strip())
        else:
            families.append((line, []))
    return families


FAMILIES = read_families(Path(__file__).with_name("shell_families.txt"))


def exercise(random: Random) -> Item:
    command, wordings = random.choice(FAMILIES)
    slots = {slot: random.choice(values.split()) for slot, values in SLOTS.items()}
    slots["n"] = str(random.choice(NUMBERS))
    for slot in ("file", "dir"):  # {file2} and {dir2} name something else than {file} and {dir}
        slots[slot + "2"] = random.choice([value for value in SLOTS[slot].split() if value != slots[slot]])
    request = random.choice(FRAMES).format(random.choice(wordings).format(**slots))
    answer = command.format(**slots)
    return Item(f"Request: {request}\nCommand:", f" {answer}", answer)
