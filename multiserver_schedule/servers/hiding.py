"""What must not be said: the secrets of a provider's OPTIONS, in whatever text they turn up."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

LEAST: Final = 4
"""Of a value that is shorter than this, nothing is hidden: its characters are everywhere."""
HIDDEN: Final = "…"
MOST: Final = 2000
"""A text is cut at this length: a server's answer may be a page, or a file."""
_LONG: Final = 20 * MOST
"""More than this of either end of a text is not even looked at."""
_NO_TEXT: Final = re.compile("[\\0\\ud800-\\udfff]")
"""What PostgreSQL does not keep, and halves of characters, which no database does: of file names, for one."""
_WORD: Final = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""One of "API_KEY", "apiKey", "api-key": names are looked at by their words, so that an author is no "auth"."""
_SECRET: Final = re.compile("(.*(secret|token|credential)|creds|dsn|authorization)s?")
"""A word that tells of a secret wherever it stands."""
_SECRET_LAST: Final = re.compile(
    "(.*(password|passwd|passphrase|passcode|pwd)s?|(?!bypass|compass).*pass|o?auth|"
    ".*(api|access|account|auth|encryption|master|private|secret|shared|signing)key)"
)
"""One that does so at the end of a name: the file of a password, or the URL where one logs in, is none."""
_SECRET_TOGETHER: Final = re.compile("pass(word|wd|phrase|code)s?$")
_OPEN_KEYS: Final = frozenset(("cache", "foreign", "host", "partition", "primary", "pub", "public", "sort", "ssh"))
"""What may be said is a key of these, any other may open something."""
_IN_URL: Final = re.compile(
    r"""
    (?<=://)
    # A host, and then a path in which there is an "@"; whatever else has a "/" before its "@" is a password with one.
    (?! (?: [^\s'"/?\#:@]* | (?: localhost | \[[0-9a-f:.]*\] | [^\s'"/?\#:@]* \. [^\s'"/?\#:@]* ) : \d{1,5} ) [/?\#] )
    # Who asks for a key, and no password.
    (?! git@ | (?<=ssh://) [^\s'":@]+@ )
    (?: [^\s'"]{1,1000} | :[^\n]{1,1000}? )
    (?=@)
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What is before the host in a URL: up to the last "@", and not the first, for all of a password to be in it."""

_STANDS: Final = "$<{"
"""With one of these begins what stands for a password."""


def is_secret(name: object) -> bool:
    """Say whether an option or an entry of a configuration is called as secrets are: "api_key", "password", …"""
    words = [word.lower() for word in _WORD.findall(str(name))]
    if not words:
        return False
    *before, last = words
    return (
        any(map(_SECRET.fullmatch, words))
        or _SECRET_LAST.fullmatch(last) is not None
        or _SECRET_TOGETHER.search("".join(words)) is not None
        or (last == "key" and not (before and before[-1] in _OPEN_KEYS))
    )


def has_password(text: str) -> bool:
    """Say whether a URL with a password is in a text; "$TOKEN" and "{key}" stand for one that is not there."""
    return any(_parted(found[0])[1][0] not in _STANDS for found in _IN_URL.finditer(text))


def unreadable(url: str) -> str:
    """
    Say of a URL that cannot be taken apart what is wrong with it, and show nothing of it; "" where it can be.

    Libraries say then what they took for the port or the host, which is a part of the password.
    """
    try:
        parts = urlsplit(url)
        rest = parts.path + parts.fragment + ("" if parts.path else parts.query)
        is_cut = "@" in rest and re.search("[:@]", parts.netloc) is not None
        _ = parts.port  # raises where it is no number
        if not is_cut:
            return ""
    except ValueError:
        pass
    return (
        "cannot be read as a URL; it is not shown, since its password may be. Percent-encode what is special in that: "
        "%2F for '/', %23 for '#', %3F for '?', %40 for '@'."
    )


def without(text: str, options: Any = None) -> str:
    """
    Return a text without the secrets of these options, nor any password in a URL: a driver's error, mostly.

    It is one that any database keeps: without what is no text there, and of a length at which a row can be read.
    """
    text = _hidden(text, options)
    return text if len(text) <= MOST else f"{text[: MOST - 1]}{HIDDEN}"


def told(error: BaseException, options: Any = None) -> str:
    """Return an error in a line; a broker's may hold its URL."""
    return without(f"{type(error).__name__}: {' '.join(str(error).split())}", options)


def traced(error: BaseException, options: Any = None) -> str:
    """Return an error with where it came from."""
    # Not cut as rows are: its last lines say most, and it is for the log alone.
    return _hidden("".join(traceback.format_exception(error)), options)


def _hidden(text: str, options: Any) -> str:
    for value in sorted(set(_secrets(options, secret=False)), key=lambda value: (-len(value), value)):
        if len(value) >= LEAST:
            text = text.replace(value, HIDDEN)
    if len(text) > 2 * _LONG:
        # What is searched for URLs takes time with each "://".
        text = f"{text[:_LONG]}{HIDDEN}{text[-_LONG:]}"
    text = _IN_URL.sub(lambda found: f"{_parted(found[0])[0]}{HIDDEN}", text)
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


def _parted(given: str) -> tuple[str, str]:
    """Return what may be shown of what is before a URL's host, and what may not; a user alone is a token."""
    user, colon, password = given.partition(":")
    return (user + colon, password) if password else ("", given)


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
