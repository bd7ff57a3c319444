"""
Scheduled tasks that run once, whatever the number of servers.

    from multiserver_schedule import schedule

    schedule.command("clearsessions").daily_at("03:00")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from .declare import schedule

__version__: Final = "0.1.0"
__all__ = ["__version__", "current_run", "schedule"]

if TYPE_CHECKING:
    from .run.current import current_run
else:

    def __getattr__(name: str) -> Any:
        # Declaring does not load what runs: only a task that is running asks for this.
        if name == "current_run":
            return import_module(".run.current", __name__).current_run
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
