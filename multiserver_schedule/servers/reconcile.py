"""
In which order is what was decided brought about at a provider? Look, plan, then the next step of each server.

A step is three things, and the process may die between any two of them:

1. the row is changed, by compare-and-set: what is about to be done stands there before it is done;
2. the provider is called, in a thread of its own, with nothing held in the database;
3. the row is changed again, by compare-and-set, with what came of it.

Whoever comes after a death between 1 and 3 finds that in the row: a creation whose answer is not known
(``unanswered_at``) is looked up by its key before it is asked for again, and all other calls do no harm when they are
made twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from multiserver_schedule.faults import point
from multiserver_schedule.logs import distance

from . import conf, ledger, observe, planner, providers, signals, types
from .drains.base import jobs_left
from .entries import Machine, MachineState
from .exceptions import FleetError, ProviderBusy, ProviderError, ProviderFull, ProviderRefused
from .hiding import traced
from .providers.base import BaseProvider
from .states import HANGS, IN_TRANSIT, Status, backoff
from .visit import AT_ONCE, MOST_BACKOFF, Calls, Report, Visit, clock

if TYPE_CHECKING:
    from .models import Provider, Server

logger = logging.getLogger("multiserver_schedule.servers")

_DOWN: Final = (MachineState.STOPPED, MachineState.STOPPING)
BUDGET: Final = timedelta(minutes=2)
"""After so long a pass begins no further step: the next one goes on."""


class _RefusedSinceDown(ProviderRefused):
    """A machine is not rebooted, and it is down, or on its way there."""


def run(name: str, *, now: datetime | None = None) -> Report:
    """
    Take every step that is due at this provider, once.

    A provider that does not answer is no error: it is noted on its row, told once, and left alone for a while, twice
    as long each time. Raises FleetError where it cannot be had at all.
    """
    settings = conf.load()
    limits = conf.provider(name)
    report = Report(name)
    if limits.only_on and ledger.who() not in limits.only_on:
        report.trouble = f"it may be called by {', '.join(limits.only_on)} alone, and this is {ledger.who()}"
        return report
    sample = providers.make(name)
    calls = Calls(name)
    try:
        _Pass(Visit(report, settings, limits, sample, calls, clock(now))).go()
    finally:
        calls.close()
    return report


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A call that is about to be made for a server, and what becomes of its answer or error."""

    server: Server
    call: Callable[..., Any]
    """Given the provider; a drain, nothing."""
    then: Callable[[Server, Any], None]
    failed: Callable[[Server, Exception], None]
    is_drain: bool = False
    """Is its drain asked, and not the provider?"""
    began: float = field(default_factory=time.monotonic)


class _Pass:
    """One pass at one provider: its order, and what the next step is from each status."""

    def __init__(self, visit: Visit) -> None:
        self.visit, self.report, self.settings, self.limits = visit, visit.report, visit.settings, visit.limits
        self.name, self.sample, self.clock = visit.name, visit.sample, visit.clock
        self.types, self.answers_within = visit.types, visit.answers_within
        self._steps: Final[Mapping[Status, Callable[[Server, datetime], _Step | None]]] = {
            Status.NEW: self._new,
            Status.STARTING: self._starting,
            Status.RUNNING: self._running,
            Status.REBOOTING: self._rebooting,
            Status.DRAINING: self._draining,
            Status.STOPPING: self._stopping,
            Status.STOPPED: self._stopped,
            Status.ERRORED: self._gone_wrong,
            Status.HANGING: self._gone_wrong,
            Status.DELETING: self._deleting,
        }
        self.until = time.monotonic() + BUDGET.total_seconds()

    def go(self) -> None:
        """Look, plan, take the steps."""
        row = ledger.provider(self.name)
        if row.next_look_at and row.next_look_at > self.clock() and row.trouble:
            self.report.trouble = row.trouble
        elif self._has_to_look(row):
            observe.look(self.visit, row)
        planner.bring_about(now=self.clock())
        point("servers_planned")
        if not self.report.trouble:
            self._take_steps()

    def _has_to_look(self, row: Provider) -> bool:
        if row.next_look_at is None or row.next_look_at <= self.clock():
            return True
        if ledger.servers().filter(provider=self.name, status__in=IN_TRANSIT).exists():
            return True
        return planner.creates_at(self.name, now=self.clock())

    # -- steps --------------------------------------------------------------------------------------------------------

    def _take_steps(self) -> None:
        """Take the steps that are due, several at a time, until none is or the time is up."""
        under_way: dict[Future[Any], _Step] = {}
        begun: set[tuple[int, int]] = set()
        while True:
            busy = {step.server.pk for step in under_way.values()}
            fresh = [each for each in self._due() if each.pk not in busy and (each.pk, each.version) not in begun]
            if time.monotonic() >= self.until:
                self.report.left, fresh = len(fresh), []
            drains = sum(step.is_drain for step in under_way.values())
            for server in [
                *[each for each in fresh if each.status == Status.DRAINING][: AT_ONCE - drains],
                *[each for each in fresh if each.status != Status.DRAINING][: AT_ONCE - len(under_way) + drains],
            ]:
                begun.add((server.pk, server.version))
                step = self._begin(server)
                if step is not None:
                    under_way[self._submitted(step)] = step
            if not under_way:
                if not fresh:
                    return
                continue
            done, _ = wait(under_way, timeout=self._until_late(under_way.values()), return_when="FIRST_COMPLETED")
            for future in done:
                self._finish(under_way.pop(future), future)
            late = [future for future, step in under_way.items() if self._left(step) <= 0]
            if any(not under_way[future].is_drain for future in late):
                # Longer than it may take: the answers are unknown, as they stand in the rows.
                self.visit.silent(ledger.provider(self.name))
                return
            for future in late:
                self._no_answer(under_way.pop(future))

    def _submitted(self, step: _Step) -> Future[Any]:
        calls, call = self.visit.calls, step.call
        return calls.submit_drain(call) if step.is_drain else calls.submit(call)

    def _left(self, step: _Step) -> float:
        """Return for how many seconds its answer is waited for still."""
        return step.began + self.visit.patience - time.monotonic()

    def _until_late(self, steps: Iterable[_Step]) -> float:
        """Return for how many seconds nothing is to be done if no answer comes; others may have a step before."""
        return max(0, min(self.settings.poll.total_seconds(), *(self._left(step) for step in steps)))

    def _due(self) -> list[Server]:
        due = ledger.servers().filter(provider=self.name, next_step_at__lte=self.clock())
        # What costs money and does no work first.
        return sorted(
            due, key=lambda server: (server.status in (Status.NEW, Status.STARTING), server.next_step_at, server.pk)
        )

    def _begin(self, server: Server) -> _Step | None:
        """Change the row as far as that can be done before the provider is called, and return the call, if any."""
        now = self.clock()
        status = Status(server.status)
        if observe.is_missing(self.visit, server, now):
            # Asked for by its name, before it is given up: a list may be cut short.
            machine_id = server.machine_id
            return self._taken(server, lambda provider: provider.has_been_deleted(machine_id), self._is_it_gone)
        return self._steps[status](server, now)

    def _taken(
        self,
        server: Server,
        call: Callable[..., Any],
        then: Callable[[Server, Any], None],
        failed: Callable[[Server, Exception], None] | None = None,
        is_drain: bool = False,
        **values: Any,
    ) -> _Step | None:
        """Write down that a call is about to be made; None when somebody else took the step first."""
        if not ledger.change(server, **{"next_step_at": self.clock() + self.answers_within, **values}):
            return None
        point("servers_before_call")
        return _Step(server, call, then, failed or self._failed, is_drain)

    def _finish(self, step: _Step, future: Future[Any]) -> None:
        """Change the row to what came of the call."""
        point("servers_after_call")
        server = step.server
        try:
            answer = future.result()
        except Exception as error:
            step.failed(server, error)
            return
        step.then(server, answer)

    def _no_answer(self, step: _Step) -> None:
        """Note that a drain did not answer in time. Its provider has nothing to do with that: other steps go on."""
        server, text = step.server, f"its drain did not answer within {distance(self.answers_within)}"
        if text != server.error:
            logger.warning("%s is %s, and %s.", server.name, server.status, text)
        self._put_off(server, text)

    def _failed(self, server: Server, error: Exception, **values: Any) -> None:
        """Try again later, twice as late each time."""
        self._note_error(server, error)
        self._put_off(server, self.visit.told(error), error, **values)

    def _put_off(
        self,
        server: Server,
        text: str,
        error: Exception | None = None,
        since: datetime | None = None,
        **values: Any,
    ) -> None:
        now = self.clock()
        # One error may be of the moment at which the provider, or the scheduler, is back.
        if server.attempts and self._hangs(server, since=since, error=text, error_at=now):
            return
        again = backoff(server.attempts + 1, self.settings.poll, MOST_BACKOFF)
        if isinstance(error, ProviderBusy) and error.retry_after is not None:
            again = max(again, error.retry_after)
        more = {
            "attempts": server.attempts + 1,
            "error": text,
            "error_at": now,
            "next_step_at": now + again,
        }
        ledger.change(server, **more, **values)

    def _note_error(self, server: Server, error: Exception, by: str = "") -> None:
        """Log an error, once while it stays the same; one that no provider would raise on purpose with its place."""
        text = self.visit.told(error)
        if text != server.error:
            trace = ""
            if not isinstance(error, ProviderError | FleetError):
                trace = f"\n{traced(error, self.limits.options)}"
            logger.warning("%s is %s, and %s said: %s%s", server.name, server.status, by or self.name, text, trace)

    def _later(self, server: Server, **values: Any) -> None:
        """Look again after a while, unless that has been done for too long."""
        if not self._hangs(server):
            ledger.change(server, **{"next_step_at": self.clock() + self.settings.poll, "attempts": 0, **values})

    def _hangs(self, server: Server, since: datetime | None = None, **values: Any) -> bool:
        """
        Give up a server that is not done yet, or of which that cannot be told, when its time is over.

        After the step and not before: while nobody could ask, for whatever reason, it may have got done.
        """
        status, now = Status(server.status), self.clock()
        since = since or server.called_at or server.status_changed_at
        if status not in HANGS or now - since < self._may_take(status):
            return False
        if status is Status.STARTING:
            self.visit.setback()
        self.visit.move(server, Status.HANGING, f"{status} for {distance(now - server.status_changed_at)}", **values)
        return True

    def _may_take(self, status: Status) -> timedelta:
        """Return how long a server may be on its way: to its end, as long as its provider gives it, and a few looks."""
        given = getattr(self.sample, "stop_timeout", None)
        if status is Status.STOPPING and isinstance(given, timedelta):
            return max(self.settings.hanging_after, given + 3 * self.settings.poll)
        return self.settings.hanging_after

    def _is_asked_again(self, server: Server, now: datetime) -> bool:
        """
        Say whether what was asked for is to be asked for once more: each three polls, counted from the first time.

        A request may be lost, and whoever was to ask may have died before it did.
        """
        if server.called_at is None or server.next_step_at is None:
            return True
        every = 3 * self.settings.poll
        waited = backoff(server.attempts, self.settings.poll, MOST_BACKOFF)
        looked_at = max(server.next_step_at - waited, server.called_at)
        return (now - server.called_at) // every > (looked_at - server.called_at) // every

    # Each of these begins the step of one status: change the row, return the call.

    def _new(self, server: Server, now: datetime) -> _Step | None:
        not_before = ledger.provider(self.name).not_before
        if (not_before and not_before > now) or planner.refused(server.type, self.name, now=now):
            return None
        previous = server.status
        reason = f"created at {self.name}"
        try:
            taken = ledger.take_place(
                server,
                limit=self.limits.max_servers,
                reason=reason,
                now=now,
                unanswered_at=now,
                asked_at=server.asked_at or now,
                next_step_at=now + self.answers_within,
            )
        except ledger.NoRoom as full:
            self._no_room(server, str(full))
            return None
        if not taken:
            return None
        self.report.steps.append(f"{server.name}: {previous} → {server.status} ({reason})")
        point("servers_before_create")
        return self._creation(server)

    def _creation(self, server: Server) -> _Step | None:
        info = server.info()
        try:
            info = replace(info, configuration=types.resolved(info.configuration, self.limits.options))
        except FleetError as error:
            self._refused(server, error)
            return None
        return _Step(server, lambda provider: provider.create_server(info), self._created, self._not_created)

    def _created(self, server: Server, machine: Machine) -> None:
        point("servers_after_create")
        if not ledger.change(
            server,
            machine_id=machine.id,
            address=machine.address,
            booted=machine.booted,
            called_at=self.clock(),
            unanswered_at=None,
            attempts=0,
            error="",
            seen_at=self.clock(),
            next_step_at=self.clock(),
        ):
            logger.warning("%s was changed while %s made its machine %s.", server.name, self.name, machine.id)

    def _not_created(self, server: Server, error: Exception) -> None:
        if isinstance(error, ProviderFull):
            self._no_room(server, self.visit.told(error), error=error)
        elif isinstance(error, ProviderRefused | FleetError):
            self._refused(server, error)
        elif isinstance(error, ProviderBusy):
            # It certainly did nothing: to be called again, and not to be looked up.
            self._failed(server, error, unanswered_at=None)
        else:
            self._failed(server, error)

    def _no_room(self, server: Server, why: str, error: Exception | None = None) -> None:
        """Let a server wait for room, and its provider alone for a while."""
        now = self.clock()
        row = ledger.provider(self.name)
        again_at = self.visit.again_at(row)
        reason = f"no room at {self.name}: {why}"
        if server.status == Status.STARTING:
            attempts = server.attempts + 1
            self.visit.move(
                server,
                Status.NEW,
                reason,
                next_step_at=again_at,
                attempts=attempts,
                error=self.visit.told(error) if error else why,
                error_at=now,
                asked_at=None,
                unanswered_at=None,
            )
            ledger.providers().filter(pk=row.pk).update(failures=row.failures + 1, not_before=again_at)
            is_news = row.failures == 0
        else:
            is_news = server.reason != reason
            ledger.change(server, next_step_at=again_at, reason=reason)
        if is_news:
            signals.server_limit_hit.send_robust(
                type(server), server=server, provider=self.name, type=server.type, reason=reason, previous=""
            )

    def _refused(self, server: Server, error: Exception) -> None:
        """
        Give up a server that will never be made: the next one of its type waits, at this provider alone.

        Others do not: the mistake is most likely one of what is written down of the type.
        """
        self._note_error(server, error)
        text = self.visit.told(error)
        self.visit.move(server, Status.ERRORED, text, error=text, error_at=self.clock(), unanswered_at=None)

    def _starting(self, server: Server, now: datetime) -> _Step | None:
        if server.machine_id:
            return self._taken(
                server,
                lambda provider: provider.has_started(server.machine_id),
                self._is_it_up,
                next_step_at=now + self.settings.poll,
            )
        if server.unanswered_at is None:
            if not ledger.change(server, unanswered_at=now, next_step_at=now + self.answers_within):
                return None
            point("servers_before_create")
            return self._creation(server)
        return self._search(server, self._looked_up)

    def _is_it_up(self, server: Server, is_up: bool) -> None:
        now = self.clock()
        if not is_up:
            self._later(server)
            return
        ledger.providers().filter(name=self.name).update(failures=0, not_before=None)
        took = distance(now - server.status_changed_at)
        self._run(server, f"up after {took}")

    def _run(self, server: Server, reason: str, **values: Any) -> None:
        wants = server.reboot_requested_at is not None
        self.visit.move(
            server,
            Status.RUNNING,
            reason,
            running_at=self.clock(),
            error="",
            missing_since=None,
            next_step_at=self.clock() if wants else None,
            **values,
        )

    def _looked_up(self, server: Server, machines: Sequence[Machine]) -> None:
        """Go on from an answer that was lost: the machine is there, or it is not."""
        now = self.clock()
        if machines:
            # Should there be more than one, the others have no row, and are found as such.
            first = min(machines, key=lambda machine: machine.id)
            self._created(server, first)
            return
        if self.sample.idempotent or now - (server.unanswered_at or now) >= self.sample.settles:
            # Not made: to be asked for again, with the same key.
            ledger.change(server, unanswered_at=None, next_step_at=now)
        else:
            self._later(server)

    def _running(self, server: Server, now: datetime) -> _Step | None:
        if server.reboot_requested_at is None:
            # All is well; what failed while it was looked for is over.
            over = {"attempts": 0, "error": "", "error_at": None} if server.attempts else {}
            ledger.change(server, next_step_at=None, **over)
            return None
        kind = self.types.get(server.type)
        if kind is None and self._is_left_alone(server, now):
            return None
        if kind is not None and kind.drain is not None:
            asked_at = server.reboot_requested_at
            self.visit.move(
                server, Status.DRAINING, "to be rebooted, as it was asked for", reboot_requested_at=asked_at
            )
        else:
            self.visit.move(server, Status.REBOOTING, "as it was asked for", reboot_requested_at=None)
        return None

    def _is_left_alone(self, server: Server, now: datetime) -> bool:
        """Say whether another version of the project knows its type, and so how it is drained."""
        return bool(planner.left_alone(ledger.targets().filter(type=server.type).first(), now))

    def _is_it_gone(self, server: Server, is_gone: bool) -> None:
        if is_gone:
            reason = f"its machine is gone at {self.name}, and not by us"
            if self.visit.is_young(server, server.missing_since or self.clock()):
                self.visit.died_young(server, Status.DELETED, reason)
                logger.error("%s did not live: %s", server.name, server.reason)
                return
            if server.status == Status.STARTING:
                self.visit.setback()
            self.visit.move(server, Status.DELETED, reason)
        else:
            ledger.change(server, missing_since=None, next_step_at=self.clock())

    def _rebooting(self, server: Server, now: datetime) -> _Step | None:
        machine_id = server.machine_id
        if server.called_at is None:

            def reboot(provider: BaseProvider) -> str:
                before = next((each for each in provider.find_by_tag(server.key) if each.id == machine_id), None)
                try:
                    provider.reboot_server(machine_id)
                except ProviderRefused as error:
                    if before is not None and before.state in _DOWN:
                        raise _RefusedSinceDown(str(error)) from error
                    raise
                return before.booted if before is not None else ""

            return self._taken(server, reboot, self._rebooted, self._not_rebooted, called_at=now)

        def look(provider: BaseProvider) -> tuple[bool, str]:
            is_up = provider.has_started(machine_id)
            machines = provider.find_by_tag(server.key) if server.booted else ()
            return is_up, next((machine.booted for machine in machines if machine.id == machine_id), "")

        return self._taken(server, look, self._is_it_up_again, next_step_at=now + self.settings.poll)

    def _rebooted(self, server: Server, booted: str) -> None:
        self._later(server, booted=booted)

    def _not_rebooted(self, server: Server, error: Exception) -> None:
        if isinstance(error, ProviderRefused):
            self._note_error(server, error)
            text, to = self.visit.told(error), Status.RUNNING
            if isinstance(error, _RefusedSinceDown):
                # Its drain has ended it. Running it would be for a moment, and its end that of one that did not live.
                text, to = f"its machine is down, and is not rebooted: {text}", Status.STOPPING
            self.visit.move(server, to, text, error=text, error_at=self.clock())
        else:
            # It was not asked for, so it goes on to be: by its time as a whole.
            self._failed(server, error, since=server.status_changed_at, called_at=None)

    def _is_it_up_again(self, server: Server, seen: tuple[bool, str]) -> None:
        is_up, booted = seen
        # "Started" may be said of the time before the reboot; a poll has passed since the call, at least.
        if is_up and (not server.booted or booted != server.booted):
            # What it was booted as is kept: by that, the next reboot is told from this one.
            took = distance(self.clock() - server.status_changed_at)
            self._run(server, f"rebooted within {took}", booted=booted or server.booted)
        elif is_up and server.called_at and self.clock() - server.called_at >= 3 * self.settings.poll:
            # It works, and has not been booted since: the request was lost, perhaps with the process that made it.
            asked_late = server.called_at - server.status_changed_at >= self.settings.hanging_after
            if not (asked_late and self._hangs(server, since=server.status_changed_at)):
                self._later(server, called_at=None)
        else:
            self._later(server)

    def _draining(self, server: Server, now: datetime) -> _Step | None:
        kind = self.types.get(server.type)
        if kind is None and self._is_left_alone(server, now):
            return None
        if kind is None or kind.drain is None:
            self.visit.drained(server, "it has no drain")
            return None
        # From when it was told first, however long nobody could tell it.
        if server.called_at is not None and now - server.called_at >= kind.drain_limit:
            jobs = f"{server.jobs} job{' runs' if server.jobs == 1 else 's run'}"
            left = f", and {jobs} still" if server.jobs else ""
            logger.warning("%s is not drained after %s%s.", server.name, distance(kind.drain_limit), left)
            self.visit.drained(server, f"not drained within {distance(kind.drain_limit)}{left}")
            return None
        info, drain = server.info(), kind.drain
        return self._taken(
            server,
            lambda: jobs_left(drain(info), drain),
            self._is_it_drained,
            self._not_drained,
            is_drain=True,
            called_at=server.called_at or now,
        )

    def _not_drained(self, server: Server, error: Exception) -> None:
        self._note_error(server, error, by="its drain")
        self._put_off(server, self.visit.told(error), error)

    def _is_it_drained(self, server: Server, jobs: int) -> None:
        if jobs:
            self._later(server, jobs=jobs)
        else:
            self.visit.drained(server, f"drained within {distance(self.clock() - server.status_changed_at)}", jobs=0)

    def _stopping(self, server: Server, now: datetime) -> _Step | None:
        machine_id = server.machine_id
        if not machine_id:
            return self._search(server, self._found_to_end)
        if server.called_at is None:
            return self._taken(
                server,
                lambda provider: provider.stop_server(machine_id),
                self._stop_was_asked,
                self._not_stopped,
                called_at=now,
            )
        if self._is_asked_again(server, now):

            def ask_and_look(provider: BaseProvider) -> bool:
                provider.stop_server(machine_id)
                return provider.has_stopped(machine_id)

            return self._taken(server, ask_and_look, self._is_it_down, self._not_stopped)
        return self._taken(
            server,
            lambda provider: provider.has_stopped(machine_id),
            self._is_it_down,
            next_step_at=now + self.settings.poll,
        )

    def _stop_was_asked(self, server: Server, answer: None) -> None:
        ledger.change(server, next_step_at=self.clock(), attempts=0)

    def _not_stopped(self, server: Server, error: Exception) -> None:
        """Delete as it is what will never be stopped: to wait would change nothing but the bill."""
        if isinstance(error, ProviderRefused):
            self._note_error(server, error)
            text = self.visit.told(error)
            reason = f"deleted without being stopped: {text}"
            self.visit.move(server, Status.DELETING, reason, error=text, error_at=self.clock())
        else:
            self._failed(server, error)

    def _is_it_down(self, server: Server, is_down: bool) -> None:
        if is_down:
            self.visit.move(server, Status.STOPPED, f"down after {distance(self.clock() - server.status_changed_at)}")
        else:
            self._later(server)

    def _stopped(self, server: Server, now: datetime) -> _Step | None:
        self.visit.move(server, Status.DELETING, "it has stopped")
        return None

    def _gone_wrong(self, server: Server, now: datetime) -> _Step | None:
        if not server.machine_id:
            return self._search(server, self._found_to_end)
        self.visit.move(server, Status.DELETING, f"cleaned up: it was {server.status}")
        return None

    def _search(self, server: Server, then: Callable[[Server, Any], None]) -> _Step | None:
        """Look for the machine of a server of which it is not known whether it was made."""
        key = server.key
        return self._taken(server, lambda provider: provider.find_by_tag(key), then)

    def _found_to_end(self, server: Server, machines: Sequence[Machine]) -> None:
        now = self.clock()
        if machines:
            first = min(machines, key=lambda machine: machine.id)
            ledger.change(server, machine_id=first.id, address=first.address, next_step_at=now)
        elif server.unanswered_at is None or now - server.unanswered_at >= self.answers_within + self.sample.settles:
            self.visit.move(server, Status.DELETED, f"{self.name} has no machine of it", unanswered_at=None)
        else:
            self._later(server)

    def _deleting(self, server: Server, now: datetime) -> _Step | None:
        machine_id = server.machine_id
        if not machine_id:
            return self._search(server, self._found_to_end)
        if server.called_at is None:
            return self._taken(
                server, lambda provider: provider.delete_server(machine_id), self._deletion_was_asked, called_at=now
            )
        if self._is_asked_again(server, now):

            def ask_and_look(provider: BaseProvider) -> bool:
                provider.delete_server(machine_id)
                return provider.has_been_deleted(machine_id)

            return self._taken(server, ask_and_look, self._has_it_gone)
        return self._taken(
            server,
            lambda provider: provider.has_been_deleted(machine_id),
            self._has_it_gone,
            next_step_at=now + self.settings.poll,
        )

    def _deletion_was_asked(self, server: Server, answer: None) -> None:
        point("servers_after_delete")
        ledger.change(server, next_step_at=self.clock(), attempts=0)

    def _has_it_gone(self, server: Server, is_gone: bool) -> None:
        if is_gone:
            self.visit.move(server, Status.DELETED, f"gone after {distance(self.clock() - server.status_changed_at)}")
        else:
            self._later(server)
