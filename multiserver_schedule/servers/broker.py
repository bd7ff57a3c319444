"""How is a Celery app found by its name, and a call to its broker ended that hangs? For load and drains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from celery import Celery
from celery.app.utils import find_app

from .exceptions import FleetError
from .hiding import unreadable

LIMITED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "redis": ("socket_timeout", "socket_connect_timeout"),
    "amqp": ("read_timeout", "write_timeout"),
}
"""Which transport options end a call to a broker that hangs, by the kind of broker (Kombu's ``driver_type``)."""


def limits(kind: str, seconds: float) -> dict[str, float]:
    """Return the options with which no call to such a broker lasts longer; none where its kind is not known."""
    return dict.fromkeys(LIMITED_BY.get(kind, ()), seconds)


def find(name: str, otherwise: str) -> Celery:
    """Return the app of this name, as for ``celery --app``. Raises FleetError with ``otherwise``, and why."""
    try:
        return find_app(name)
    except (ImportError, AttributeError) as error:
        raise FleetError(f"{otherwise}: {error}.") from error


def refuse_unreadable(urls: object, where: str) -> None:
    """Raise FleetError, which begins with ``where``, if the URL of one of an app's brokers cannot be taken apart."""
    for each in urls.split(";") if isinstance(urls, str) else urls if isinstance(urls, list | tuple) else ():
        if isinstance(each, str) and (wrong := unreadable(each)):
            raise FleetError(f"{where}: its broker {wrong}")
