"""Where machines come from: ``base.BaseProvider``, and one module for each kind."""

from __future__ import annotations

from django.utils.module_loading import import_string

from .. import conf
from ..exceptions import FleetError
from .base import BaseProvider


def make(name: str) -> BaseProvider:
    """Return a new instance of a provider of the settings, for one thread. Raises FleetError where it cannot be had."""
    settings = conf.load()
    chosen = conf.provider(name)
    where = f"{conf.SETTING}['PROVIDERS'][{name!r}]"
    try:
        backend = import_string(chosen.backend)
    except ImportError as error:
        raise FleetError(f"{where}['BACKEND']: {error}. If it needs an extra, install that.") from error
    if not isinstance(backend, type) or not issubclass(backend, BaseProvider):
        raise FleetError(f"{where}['BACKEND'] {chosen.backend!r} should be a subclass of {BaseProvider.__qualname__}.")
    return backend(name, chosen.options, fleet=settings.fleet)
