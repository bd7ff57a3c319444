"""What must not be said: the secrets of a provider's OPTIONS, in whatever text they turn up."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, Final

LEAST: Final = 4
"""Of a value that is shorter than this, nothing is hidden: its characters are everywhere."""
HIDDEN: Final = "…"
_SECRET: Final = re.compile(
    r"pass(word|wd|phrase|code)?$|secret|token|(^|[_-]|[a-z])key$|credential|auth|dsn", re.IGNORECASE
)
_IN_URL: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s/@]+(?=@)", re.IGNORECASE)

_STANDS: Final = "$<{"
"""With one of these begins what stands for a password."""


def is_secret(name: object) -> bool:
    """Say whether an option or an entry of a configuration is called as secrets are: "api_key", "password", …"""
    return _SECRET.search(str(name)) is not None


def has_password(text: str) -> bool:
    """Say whether a URL with a password is in a text; "$TOKEN" and "{key}" stand for one that is not there."""
    return any(found[0][found.end(1) - found.start()] not in _STANDS for found in _IN_URL.finditer(text))


def without(text: str, options: Any = None) -> str:
    """Return a text without the secrets of these options, nor any password in a URL: a driver's error, mostly."""
    text = _IN_URL.sub(rf"\1{HIDDEN}", text)
    for value in sorted(set(_secrets(options, secret=False)), key=lambda value: (-len(value), value)):
        if len(value) >= LEAST:
            text = text.replace(value, HIDDEN)
    return text


def told(error: BaseException, options: Any = None) -> str:
    """Return an error in a line; a broker's may hold its URL."""
    return without(f"{type(error).__name__}: {' '.join(str(error).split())}", options)


def traced(error: BaseException, options: Any = None) -> str:
    """Return an error with where it came from."""
    return without("".join(traceback.format_exception(error)), options)


def _secrets(value: Any, *, secret: bool) -> Iterator[str]:
    """Yield the texts that stand under a name that is called as secrets are, at any depth."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secrets(inner, secret=secret or is_secret(name))
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _secrets(inner, secret=secret)
    elif secret and isinstance(value, str):
        yield value
