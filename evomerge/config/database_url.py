"""Database URLs without showing their passwords, which may come from the environment.

`postgresql+psycopg://me:${EVOMERGE_DB_PASSWORD}@host/db` takes the password from the environment when the database is
opened; then no file that evomerge writes contains it.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

from evomerge.errors import EvomergeError

VARIABLE = re.compile(r"\$\{([^}]*)\}")
# A password may contain any character, so it ends at the last @ of the URL.
LOGIN = re.compile(r"(?P<before>://[^:/]*:)(?P<password>.+)@", re.DOTALL)
# An ODBC connection string is a query of its own, with ";" between its parts, often percent-encoded as a whole.
SECRET = re.compile(
    r"(?P<before>[?&;][^=&;]*(?:pass|pwd|secret|token|key|odbc_connect)[^=&;]*=)(?P<password>[^&]*)", re.IGNORECASE
)
INNER = re.compile(r"(?:pass|pwd|secret|token|key)[^=;]*=([^;]*)", re.IGNORECASE)


def passwords(url: str) -> list[str]:
    """The parts of a URL that are passwords: in its login or in its query."""
    found = [m["password"] for pattern in (LOGIN, SECRET) for m in pattern.finditer(url)]
    first = [part.split(";")[0] for part in found]
    return [p for p in (*found, *first, *(inner for part in found for inner in INNER.findall(unquote(part)))) if p]


def has_password(url: str | None) -> bool:
    """Whether a URL as written contains a password, not only a variable of the environment."""
    return any(VARIABLE.sub("", password) for password in passwords(url or ""))


def masked(url: str) -> str:
    """The URL with its passwords replaced by `***`, to be shown; variables of the environment stay."""

    def mask(match: re.Match[str]) -> str:
        tail = "@" if match.re is LOGIN else ""
        kept = match["password"] if VARIABLE.fullmatch(match["password"]) else "***"
        return match["before"] + kept + tail

    return SECRET.sub(mask, LOGIN.sub(mask, url))


def expanded(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """The URL with its variables replaced by their values from the environment, percent-encoded.

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
