"""The one setting, ``MULTISERVER_SCHEDULE``: its keys, their defaults, and what a wrong value is told."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo

from django.conf import settings
from django.utils.module_loading import import_string

from .exceptions import ConfigurationError

SETTING: Final = "MULTISERVER_SCHEDULE"
RUNNERS: Final = ("auto", "fork", "spawn", "inline")
LOG_LEVELS: Final = ("none", "abandoned", "conflicts", "verbose")
MOST_DAYS: Final = 36_500
"""For how long anything may be kept: of a thousand years ago no database and no Python knows the date."""
ORM_LOCK: Final = "multiserver_schedule.locks.orm.ORMLock"


@dataclass(frozen=True, slots=True)
class LockSettings:
    """One entry of ``LOCKS``."""

    backend: str = ORM_LOCK
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the project set, with a default for everything that is safe on two servers."""

    locks: Mapping[str, LockSettings] = field(default_factory=lambda: {"default": LockSettings()})
    lease: timedelta = timedelta(seconds=30)
    heartbeat: timedelta = timedelta(seconds=10)
    min_break: timedelta | None = None
    catch_up: timedelta | None = None
    max_concurrency: int = 4
    time_zone: str = "UTC"
    environment: str = ""
    server_name: str = ""
    runner: str = "auto"
    history_days: int = 30
    history_runs: int = 100
    log_level: str = "abandoned"
    abandoned_after: timedelta = timedelta(minutes=10)
    housekeeping: bool = True
    """Shall a daily task of our own, ``multiserver_schedule.prune``, keep the history as short as it is set?"""
    maintenance_mode: Any = None
    """True, False, or a callable (or its dotted path) that says whether the project is in maintenance mode."""


KEYS: Final = tuple(f.name.upper() for f in fields(Settings))


def load() -> Settings:
    """
    Return the settings as they are now.

    Raises ConfigurationError, naming the key, where one is unknown or of the wrong kind.
    """
    given = getattr(settings, SETTING, {})
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{SETTING} should be a dict, not {type(given).__name__}.")
    for key in given:
        if key not in KEYS:
            raise ConfigurationError(f"{SETTING} has no option {key!r}.{_nearest(key, KEYS)}")
    default = Settings()
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.lower()
        if name == "locks":
            values[name] = _locks(value)
        elif name in ("lease", "heartbeat", "abandoned_after") or (
            name in ("min_break", "catch_up") and value is not None
        ):
            values[name] = _duration(key, value, zero=name in ("min_break", "catch_up"))
        elif name in ("max_concurrency", "history_days", "history_runs"):
            least, most = 1 if name == "max_concurrency" else 0, MOST_DAYS if name == "history_days" else None
            values[name] = _whole(key, value, least=least, most=most)
        elif name == "runner":
            values[name] = _one_of(key, value, RUNNERS)
        elif name == "log_level":
            values[name] = _one_of(key, value, LOG_LEVELS)
        elif name == "housekeeping":
            values[name] = _truth(key, value)
        elif name == "maintenance_mode":
            values[name] = value
        elif value is None and name in ("time_zone", "environment", "server_name"):
            continue
        elif name in ("time_zone", "environment", "server_name", "min_break", "catch_up"):
            if value is None:
                continue
            values[name] = _text(key, value)
    values.setdefault("time_zone", str(settings.TIME_ZONE or default.time_zone))
    try:
        ZoneInfo(values["time_zone"])
    except (KeyError, ValueError, OSError):
        raise ConfigurationError(f"{SETTING}['TIME_ZONE'] {values['time_zone']!r} is not a known time zone.") from None
    values.setdefault("server_name", socket.gethostname())
    loaded = Settings(**values)
    if loaded.heartbeat * 2 > loaded.lease:
        raise ConfigurationError(
            f"{SETTING}['HEARTBEAT'] ({loaded.heartbeat}) should be at most half of LEASE ({loaded.lease}), "
            "so that a lease outlives one renewal that fails. A third of it is a good value."
        )
    return loaded


def maintenance_mode() -> Any:
    """Return what the settings say of it now: a bool, a callable, or its dotted path."""
    given = getattr(settings, SETTING, {})
    return given.get("MAINTENANCE_MODE") if isinstance(given, Mapping) else None


def is_in_maintenance(answer: Any) -> bool:
    """Ask the project whether it is in maintenance mode: a bool, a callable, or the dotted path of one."""
    answer = imported(answer)
    return bool(answer() if callable(answer) else answer)


def imported(answer: Any) -> Any:
    """Return what is at the dotted path of MAINTENANCE_MODE, or what is no path as it is. Raises ConfigurationError."""
    if not isinstance(answer, str):
        return answer
    try:
        return import_string(answer)
    except ImportError as error:
        why = f"{SETTING}['MAINTENANCE_MODE'] {answer!r} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigurationError(f"{why.rstrip('.')}.") from error


def _nearest(key: object, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(key).upper(), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Options are: {', '.join(sorted(known))}."


def _locks(value: object) -> dict[str, LockSettings]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{SETTING}['LOCKS'] should be a dict of alias to {{'BACKEND': …}}.")
    locks = {"default": LockSettings()}
    for alias, entry in value.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("BACKEND"), str):
            raise ConfigurationError(f"{SETTING}['LOCKS'][{alias!r}] should be a dict with a 'BACKEND', a dotted path.")
        for key in entry:
            if key not in ("BACKEND", "OPTIONS"):
                raise ConfigurationError(
                    f"{SETTING}['LOCKS'][{alias!r}] has no option {key!r}.{_nearest(key, ('BACKEND', 'OPTIONS'))}"
                )
        options = entry.get("OPTIONS", {})
        if not isinstance(options, Mapping):
            raise ConfigurationError(f"{SETTING}['LOCKS'][{alias!r}]['OPTIONS'] should be a dict.")
        locks[str(alias)] = LockSettings(entry["BACKEND"], dict(options))
    return locks


def _duration(key: str, value: object, *, zero: bool) -> timedelta:
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"{SETTING}[{key!r}] should be a timedelta, not {value!r}.")
    if value < timedelta(0) or (not zero and not value):
        raise ConfigurationError(
            f"{SETTING}[{key!r}] should be {'zero or ' if zero else ''}longer than zero, not {value}."
        )
    return value


def _whole(key: str, value: object, *, least: int, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        upto = "up" if most is None else f"to {most}"
        raise ConfigurationError(f"{SETTING}[{key!r}] should be a whole number from {least} {upto}, not {value!r}.")
    return value


def _truth(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{SETTING}[{key!r}] should be True or False, not {value!r}.")
    return value


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigurationError(f"{SETTING}[{key!r}] should be one of {', '.join(map(repr, allowed))}, not {value!r}.")
    return str(value)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{SETTING}[{key!r}] should be a text, not {value!r}.")
    if key == "SERVER_NAME" and ("@" in value or len(value) > 64):
        raise ConfigurationError(f"{SETTING}['SERVER_NAME'] {value!r} should have no '@' and at most 64 characters.")
    return value
