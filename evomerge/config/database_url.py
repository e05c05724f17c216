"""Database URLs: the password is never shown, and need not stand in the file.

`postgresql+psycopg://me:${EVOMERGE_DB_PASSWORD}@host/db` takes it from the environment when the database is opened; no
file that evomerge writes has it then.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import quote

from evomerge.errors import EvomergeError

VARIABLE = re.compile(r"\$\{([^}]*)\}")
# A password may hold every sign; so it ends at the last @ before the path, or at the last of all if that is in doubt.
LOGIN = re.compile(r"(?P<before>://[^:/?#@]*:)(?P<password>.+)@", re.DOTALL)
SECRET = re.compile(r"(?P<before>[?&][^=&]*(?:pass|pwd|secret|token|key)[^=&]*=)(?P<password>[^&]*)", re.IGNORECASE)


def passwords(url: str) -> list[str]:
    """What stands in a URL where a password belongs, in its login or its query."""
    return [m["password"] for pattern in (LOGIN, SECRET) for m in pattern.finditer(url)]


def has_password(url: str | None) -> bool:
    """Whether a URL, as it is written, gives a password away."""
    return any(VARIABLE.sub("", password) for password in passwords(url or ""))


def masked(url: str) -> str:
    """A URL that may be shown: without its password; a variable of the environment stays."""

    def mask(match: re.Match[str]) -> str:
        tail = "@" if match.re is LOGIN else ""
        kept = match["password"] if VARIABLE.fullmatch(match["password"]) else "***"
        return match["before"] + kept + tail

    return SECRET.sub(mask, LOGIN.sub(mask, url))


def expanded(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """The URL with the variables of the environment in it, each as a URL writes it.

    EvomergeError names a variable that is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not environment.get(name):
            raise EvomergeError(
                f"storage: the environment variable {name!r} is not set; the URL {masked(url)} needs it"
            )
        return quote(environment[name], safe="")

    return VARIABLE.sub(value, url)
