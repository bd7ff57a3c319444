"""
For the tests of others: ``run_due`` for projects, ``LockContract`` for authors of a lock, ``ProviderContract`` for
those of a provider of servers.

What is asked for is imported when it is asked for: this package can be imported before Django is set up.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["LockContract", "ProviderContract", "Ran", "RunFailed", "run_due"]

if TYPE_CHECKING:
    from .contract import LockContract
    from .providers import ProviderContract
    from .runs import Ran, RunFailed, run_due
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = {"LockContract": ".contract", "ProviderContract": ".providers"}.get(name, ".runs")
        return getattr(import_module(module, __name__), name)
