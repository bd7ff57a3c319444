"""What the schedule of these tests does."""

from __future__ import annotations

import asyncio

from multiserver_schedule import current_run

noted: list[str] = []


def note(text: str) -> None:
    """Note a text, and what the run knows of itself."""
    run = current_run()
    assert run is not None
    run.check()
    noted.append(f"{text} {run.name} {run.due_at:%H:%M} fence {run.fence}")
    print(f"noted {text}")


def fail() -> None:
    """Fail."""
    raise ValueError("no such column")


async def asynchronous() -> None:
    """Wait for something."""
    await asyncio.sleep(0)
    noted.append("asynchronous")


def no() -> bool:
    """Say no."""
    return False
