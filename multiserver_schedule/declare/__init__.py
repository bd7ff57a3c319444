"""
DECLARE: from what a ``schedule.py`` says to the frozen tasks that everything else works with.

    sources → draft → words (when, whether, across, around) → vocabulary     one declaration, as it is said
    registry                                                         all of them, module by module
    discovery                                                        finding the modules
    verification                                                     what declaring does not check
"""

from __future__ import annotations

from . import discovery
from .discovery import Broken, Discovered
from .registry import Registry
from .verification import verify
from .vocabulary import Declaration, Decorator, Schedule

registry = Registry()
"""The declarations of this process; ``schedule`` fills it."""
schedule = Schedule(registry)
"""What users import as ``multiserver_schedule.schedule``."""


def discover() -> Discovered:
    """
    Import the ``schedule`` module of every installed app and of the project's package, and complete their declarations.

    Whatever such a module raises comes out as it is, an ImportError too; wrong declarations are a DeclarationError.
    """
    return discovery.discover(registry)


def discover_errors() -> tuple[Broken, ...]:
    """Discover, and return what went wrong in each module instead of raising it; the sound modules are registered."""
    return discovery.discover(registry, collect=True).broken


__all__ = [
    "Broken",
    "Declaration",
    "Decorator",
    "Discovered",
    "Registry",
    "Schedule",
    "discover",
    "discover_errors",
    "registry",
    "schedule",
    "verify",
]
