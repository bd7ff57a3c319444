"""
What a type checker says of declarations; it is checked, and never run.

Each ``type: ignore`` is a mistake that has to be found: mypy tells of one that is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from multiserver_schedule import current_run, schedule
from multiserver_schedule.declare import Declaration, Decorator, Schedule
from multiserver_schedule.declare.groups import Group
from multiserver_schedule.entries import ScheduledTask
from multiserver_schedule.run.current import CurrentRun

if TYPE_CHECKING:
    from typing_extensions import assert_type


def refresh(base: str) -> int:
    """Stand for a function of some app."""
    return len(base)


async def tidy_up() -> None:
    """Stand for an async function."""


# Every word returns what it was said to, so that the next one can be completed.
assert_type(schedule, Schedule)
assert_type(schedule.command("clearsessions", "--quick", verbosity=0), Declaration)
assert_type(schedule.call(refresh, "EUR"), Declaration)
assert_type(schedule.call("shop.rates.refresh", base="EUR"), Declaration)
assert_type(schedule.exec(["pg_dump", Path("/backup")]), Declaration)
assert_type(schedule.command("a").daily_at("03:00").weekdays().between("1:00", "4:00").name("b"), Declaration)
assert_type(schedule.command("a").weekly_on("monday", "8:00").days("monday").timezone(ZoneInfo("UTC")), Declaration)
assert_type(schedule.command("a").hourly_at([15, 45]).every_two_hours("*/10").monthly_on(4, "15:00"), Declaration)
assert_type(schedule.command("a").every(minutes=5).every(timedelta(minutes=5)), Declaration)
assert_type(
    schedule.command("a").when(lambda: True).skip("shop.is_closed").environments("a").only_on(["b"]), Declaration
)
assert_type(schedule.command("a").without_overlapping(min_break=timedelta(0), lease=timedelta(minutes=1)), Declaration)
assert_type(schedule.command("a").overlap("allow").on_every_server().lock_with("cache").no_catch_up(), Declaration)
assert_type(schedule.command("a").ensure_finished(minutes=30).catch_up(all=True), Declaration)
assert_type(schedule.task("shop.digests").hourly().weekdays().ensure_finished(timedelta(hours=1)), Decorator)
assert_type(schedule.command("a").before(refresh).after("shop.tell").on_success(tidy_up), Declaration)
assert_type(
    schedule.command("a").ping_before("https://a").then_ping("https://b").send_output_to(Path("c")), Declaration
)
assert_type(
    schedule.task().email_output_to("a@b", "c@d").email_output_on_failure(["a@b"]).on_failure(refresh), Decorator
)
assert_type(schedule.tasks, Mapping[str, ScheduledTask])
with schedule.group(timezone="UTC", on_failure=refresh, weekdays=True) as group:
    assert_type(group, Group)
assert_type(current_run(), CurrentRun | None)


# The decorator leaves a function's type as it is.
@schedule.task().hourly().between("08:00", "18:00")
def send_digests(to: str, *, quick: bool = False) -> int:
    return 3 if quick else len(to)


@schedule.task().daily()
async def tidy() -> bytes:
    return b""


assert_type(send_digests("a", quick=True), int)
plain: Callable[[], Coroutine[Any, Any, bytes]] = tidy
send_digests(5)  # type: ignore[arg-type]

# Mistakes that are found while they are typed.
schedule.command("a").every(5)  # type: ignore[arg-type]
schedule.command("a").ensure_finished(30)  # type: ignore[arg-type]
schedule.command("a").without_overlapping(timedelta(1))  # type: ignore[call-arg]
schedule.command("a").without_overlapping(min_break=60)  # type: ignore[arg-type]
schedule.command("a").catch_up(timedelta(1))  # type: ignore[call-arg]
schedule.command("a").weekly_on("mon")  # type: ignore[arg-type]
schedule.command("a").days(1, 2)  # type: ignore[arg-type]
schedule.command("a").overlap("never")  # type: ignore[arg-type]
schedule.command("a").daily_at(3)  # type: ignore[arg-type]
schedule.command("a").daily("13:00")  # type: ignore[call-arg]
schedule.command("a").when(True)  # type: ignore[arg-type]
schedule.command("a").after(5)  # type: ignore[arg-type]
schedule.command("a").then_ping(None)  # type: ignore[arg-type]
schedule.command("a").send_output_to(b"a")  # type: ignore[arg-type]
schedule.command("a").email_output_to(5)  # type: ignore[arg-type]
schedule.group("UTC")  # type: ignore[call-arg]
schedule.command("a").hourli()  # type: ignore[attr-defined]
schedule.hourly()  # type: ignore[attr-defined]
schedule.command("a")(refresh)  # type: ignore[operator]
schedule.call(5)  # type: ignore[arg-type]
schedule.exec(["sleep", 5])  # type: ignore[list-item]
schedule.task(refresh)  # type: ignore[arg-type]
schedule.tasks["a"] = schedule.tasks["b"]  # type: ignore[index]
