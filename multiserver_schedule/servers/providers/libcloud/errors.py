"""What does an error of libcloud's, or of the connection's, say of what was done? Pure."""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Final
from urllib.parse import quote, quote_plus

from libcloud.common.exceptions import BaseHTTPError
from libcloud.common.types import InvalidCredsError, LibcloudError, MalformedResponseError
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from ...exceptions import ProviderBusy, ProviderError, ProviderFull, ProviderRefused
from .wire import NotWhole, OutOfTime


class NotThere(ProviderRefused):
    """The provider clearly says that it has no such machine."""


SECRET: Final = re.compile(r"key|secret|pass|token|credential|proxy_url", re.IGNORECASE)
"""An argument of a driver whose name has this in it is never shown."""
PRIVATE: Final = re.compile(r"secret|pass|token|credential|user_?data", re.IGNORECASE)
"""And nor is such a value of a configuration."""
_MOST: Final = 300
_LEAST: Final = 4
_CODE: Final = re.compile(r"\A\W*([A-Z][A-Za-z0-9_.]+):")

# Documented error codes of EC2, and of UpCloud in capitals. Codes come before the status: EC2 says that it has no
# machines left with a 500, and that one calls too often with a 503.
_THROTTLED: Final = re.compile(
    r"RequestLimitExceeded|Throttl|RequestThrottled|TooManyRequests|SlowDown|BandwidthLimitExceeded|PendingVerification"
    r"|RequestExpired|\ARATE_LIMITED|SERVER_CREATING_LIMIT_REACHED",
)
_FULL: Final = re.compile(
    r"(Instance|Vcpu|Resource|ResourceCount|Volume|Address|VolumeIOPS|Fleet|Host|Spot\w*|InstanceCount|MaxIOPS"
    r"|NetworkInterface)(Limit|Count)?Exceeded|\AInsufficient\w*(Capacity|Addresses|InSubnet)|\AMaxSpotInstance"
    r"|_RESOURCES_UNAVAILABLE|_LIMIT_REACHED|INSUFFICIENT_CREDITS",
)
_FULL_TEXT: Final = re.compile(
    r"quota|droplet limit|instance limit|limit (has been |was )?(reached|exceeded)|exceeds? (your|the) .{0,40}limit"
    r"|insufficient (credit|fund|balance|capacity)|out of (stock|capacity)",
    re.IGNORECASE,
)
_NOT_NOW: Final = ("IncorrectInstanceState", "IncorrectState", "ResourceInUse", "DependencyViolation")
_MISMATCH: Final = "IdempotentParam"


def translate(
    error: BaseException, tell: Callable[[str], str], *, is_not_there: Callable[[str, str], bool]
) -> ProviderError:
    """
    Return the error to raise instead: it says what the request that failed has done, and nothing of those before it.

    ``tell`` makes a text fit to be shown. ``is_not_there`` is given a code and a text of an answer 404 or 400, and says
    whether they speak of the machine, and not of a path or a project.
    """
    if isinstance(error, ProviderError):
        return error
    if isinstance(error, OutOfTime):
        return ProviderBusy(tell(str(error)))
    if isinstance(error, NotWhole):
        return ProviderError(tell(str(error)))
    if isinstance(error, InvalidCredsError):
        return ProviderRefused(tell(f"the credentials were refused: {text_of(error)}"))
    if isinstance(error, BaseHTTPError):
        return _answered(error, tell, is_not_there)
    if isinstance(error, MalformedResponseError):
        return ProviderError(tell("the answer cannot be read: " + _oneline(str(error.body or error.value))))
    if isinstance(error, LibcloudError):
        if _MISMATCH in type(error).__name__:
            # Somebody was asked for a machine with this key before: it may be there.
            return ProviderError(tell(f"it was asked for the same key with other values before: {text_of(error)}"))
        return _by_code(code_of(text_of(error)), text_of(error), tell) or ProviderError(tell(text_of(error)))
    if isinstance(error, NotImplementedError):
        return ProviderRefused(tell(f"libcloud's driver cannot do this: {error}"))
    if isinstance(error, (OSError, HTTPError)):
        return _unconnected(error, tell)
    return ProviderError(tell(f"the answer cannot be read: {type(error).__name__}: {error}"))


def code_of(text: str) -> str:
    """Return the code that an error's text begins with, or ""."""
    found = _CODE.match(text)
    return found[1] if found else ""


def text_of(error: BaseException) -> str:
    """Return an error's own words. ``str`` of one whose message is a dict raises, and of others names objects."""
    value = getattr(error, "message", None) or getattr(error, "value", None) or (error.args[0] if error.args else "")
    if isinstance(value, Mapping):
        inner = value.get("error", value)
        if isinstance(inner, Mapping):
            code, text = inner.get("error_code", ""), inner.get("error_message", inner.get("message", ""))
            return f"{code}: {text}" if code else str(text or dict(inner))
        return str(inner)
    return str(value)


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Return the text without these, in whatever spelling a request or an answer has them."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) < _LEAST:
            continue
        encoded = base64.b64encode(secret.encode()).decode()
        for spelling in (secret, quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1], encoded):
            text = text.replace(spelling, "…")
    return text


def texts(value: Any) -> Iterator[str]:
    """Yield every text in a value."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


def shortened(text: str) -> str:
    """Return a text that fits into a row."""
    text = _oneline(text)
    return text if len(text) <= _MOST else f"{text[: _MOST - 1]}…"


def _answered(
    error: BaseHTTPError, tell: Callable[[str], str], is_not_there: Callable[[str, str], bool]
) -> ProviderError:
    """Of an answer with a status that is none of success."""
    text, status = text_of(error), int(error.code)
    code = code_of(text)
    shown = tell(f"HTTP {status}: {text}")
    if status == 429:
        # libcloud drops the text of these.
        return ProviderBusy(tell(f"HTTP 429: too many requests. {text}"), retry_after=_retry_after(error))
    known = _by_code(code, text, tell, status=status, retry_after=_retry_after(error))
    if known is not None:
        return known
    if status in (400, 404) and is_not_there(code, text):
        return NotThere(shown)
    if status in (402, 413) or (status in (400, 403, 409, 422) and _FULL_TEXT.search(text)):
        return ProviderFull(shown, retry_after=_retry_after(error))
    if status in (409, 423) or code in _NOT_NOW:
        return ProviderBusy(shown, retry_after=_retry_after(error))
    if 400 <= status < 500 and status != 408:
        return ProviderRefused(shown)
    return ProviderError(shown)


def _by_code(
    code: str,
    text: str,
    tell: Callable[[str], str],
    *,
    status: int = 0,
    retry_after: timedelta | None = None,
) -> ProviderError | None:
    shown = tell(f"HTTP {status}: {text}" if status else text)
    if code and _THROTTLED.search(code):
        return ProviderBusy(shown, retry_after=retry_after)
    if code and _FULL.search(code):
        return ProviderFull(shown, retry_after=retry_after)
    return None


def _retry_after(error: BaseHTTPError) -> timedelta | None:
    value = (error.headers or {}).get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        return None
    # An hour at most: a provider that errs about it does not put a fleet to rest for a year. NaN is not below it.
    return timedelta(seconds=seconds) if 0 < seconds <= 3600 else timedelta(hours=1) if seconds > 3600 else None


def _unconnected(error: BaseException, tell: Callable[[str], str]) -> ProviderError:
    """
    Of a connection that failed: before anything was sent, or nobody knows when.

    The texts of requests' own errors have the whole URL in them, with a signature and a machine's user data.
    """
    for each in _chain(error):
        # A kind of ConnectTimeoutError in some versions of urllib3.
        if isinstance(each, NewConnectionError):
            return ProviderBusy(tell(f"no connection: {str(each).rpartition(': ')[2]}"))
        if isinstance(each, ConnectTimeoutError):
            return ProviderBusy(tell("no connection: it was not accepted in time"))
        if isinstance(each, ssl.SSLCertVerificationError):
            return ProviderBusy(tell(f"no connection: {each.verify_message}"))
        if isinstance(each, ConnectionRefusedError):
            return ProviderBusy(tell("no connection: refused"))
    last = list(_chain(error))[-1]
    return ProviderError(tell(f"the answer was lost: {type(last).__name__}"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those inside of it: requests wraps urllib3's, which wrap those of the socket."""
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        each = waiting.pop(0)
        if not isinstance(each, BaseException) or any(each is other for other in seen):
            continue
        seen.append(each)
        yield each
        waiting += [getattr(each, "reason", None), *each.args, each.__cause__]


def _oneline(text: str) -> str:
    return " ".join(text.split())
