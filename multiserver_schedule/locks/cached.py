"""What the locks that live in a cache have in common: their options, and how long a loss holds everybody up."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from django.core.cache import DEFAULT_CACHE_ALIAS
from django.db import DEFAULT_DB_ALIAS

from .. import conf
from ..exceptions import ConfigurationError
from .base import BaseLock, Declarations

OPTIONS: Final = ("cache", "timeout", "using")
TIMEOUT: Final = 3.0
"""Seconds that connecting, and each wait for an answer, may take: with one repetition it stays well within a lease."""


class CachedLock(BaseLock):
    """A lock in the cache ``OPTIONS["cache"]``; its history goes to the database ``OPTIONS["using"]``, afterwards."""

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ConfigurationError(
                f"The lock {alias!r} has no option {unknown[0]!r}. Its options are: {', '.join(OPTIONS)}."
            )
        self.using = options.get("using", DEFAULT_DB_ALIAS)
        self.cache: str = options.get("cache", DEFAULT_CACHE_ALIAS)
        timeout = options.get("timeout", TIMEOUT)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ConfigurationError(
                f"The option 'timeout' of the lock {alias!r} should be a number of seconds above 0, not {timeout!r}."
            )
        self.timeout = float(timeout)


def longest_lease(declared: Declarations) -> timedelta:
    """Return how long an owner that was lost may take to come back: later its own lease has ended."""
    usual = conf.load().lease
    return max([usual, *(task.lease for task in declared.tasks.values() if task.lease is not None)])
