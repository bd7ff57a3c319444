"""How many servers are wanted now? Asks the project and its queues, decides for each type, and writes down why."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from multiserver_schedule.logs import distance

from . import conf, fleet, ledger, planner, types
from .demand import Decision, Standing, asked, decide
from .entries import Load
from .hiding import told, traced
from .plan import Plan
from .types import ServerType, Source
from .visit import begin

logger = logging.getLogger("multiserver_schedule.servers")

ANSWERS_WITHIN: Final = timedelta(seconds=30)
"""So long an answer is waited for. A run asks twice, one after the other, and is killed after five minutes."""
_THREAD: Final = "servers-load"
_TRIES: Final = 5
_GAP: Final = 3
"""After so many times MONITOR_EVERY without an answer, nobody knows what would have been asked for in between."""


@dataclass(frozen=True, slots=True)
class Monitored:
    """What was decided for one type, or would be."""

    type: str
    asked: int | None
    """How many servers the load asks for; None: nobody says, or it could not be told."""
    before: int
    wanted: int
    why: str
    load: Load | None
    plan: Plan
    trouble: str = ""
    """Why the load could not be told; what is wanted stays as it was then."""


def run(*, now: datetime | None = None) -> list[Monitored]:
    """Decide for every type, and change the rows accordingly; the provider is not called."""
    return _monitor(now or ledger.now(), dry=False)


def preview(*, now: datetime | None = None) -> list[Monitored]:
    """Return what would be decided and done now, and change nothing."""
    return _monitor(now or ledger.now(), dry=True)


@dataclass(frozen=True, slots=True)
class _Ask:
    asked: int | None = None
    why: str = ""
    load: Load | None = None
    """That of all sources together."""
    loads: Sequence[Load] = ()
    """That of each."""
    trouble: str = ""


def _monitor(now: datetime, *, dry: bool) -> list[Monitored]:
    asks = _asks()
    done = []
    there = planner.survey(now)
    servers = [server.name for each in there.servers.values() for server in each]
    for name in there.types:
        kind = there.kinds.get(name)
        ask = asks.get(name, _Ask())
        before = there.targets.get(name)
        was = before.wanted if before else kind.policy.minimum if kind else 0
        busy = _busy(ask.loads, servers)
        decided = _decide(name, kind, ask, busy, now, dry=dry)
        planned = there.plan(name, wanted=decided.wanted, busy=busy)
        there = there.after(planned.plan)
        done.append(
            Monitored(name, ask.asked, was, planned.needs.wanted, decided.why, ask.load, planned.plan, ask.trouble)
        )
    if not dry:
        planner.bring_about(now=now)
        for each in done:
            ledger.record(
                each.type,
                asked=each.asked,
                wanted=each.wanted,
                counted=ledger.counts(each.type),
                load=_as_json(each.load),
                why=each.why,
                now=now,
            )
    return done


def _asks() -> dict[str, _Ask]:
    """
    Ask everybody how many servers there should be. Whoever raises is logged, and then nothing is asked for.

    Each is asked in a thread of its own, and all sources at once: one that hangs is the trouble of its types alone.
    """
    asks: dict[str, _Ask] = {}
    trouble = ""
    kinds = types.known()
    try:
        asking = begin(lambda: fleet.determined(fleet), _THREAD)
        wait([asking], ANSWERS_WITHIN.total_seconds())
        determined = _answer(asking, "it") or {}
    except Exception as error:
        trouble = f"determine_server_count: {told(error)}"
        if _is_news(trouble, *(name for name, kind in kinds.items() if not kind.sources)):
            logger.error(
                "What determine_server_count was given failed, and the counts stay as they are.\n%s", traced(error)
            )
        determined = {}
    begun: dict[int, Future[Any]] = {}
    for name, kind in kinds.items():
        for source in () if name in determined else kind.sources:
            # One that several types have is asked once: nobody has promised that two threads may ask it at once.
            if id(source) not in begun:
                begun[id(source)] = begin(source, _THREAD)
    wait(begun.values(), ANSWERS_WITHIN.total_seconds())
    for name, kind in kinds.items():
        if name in determined:
            asks[name] = _Ask(determined[name], "determine_server_count asks for it")
        elif kind.sources:
            asks[name] = _ask(kind, begun)
        elif trouble:
            asks[name] = _Ask(trouble=trouble)
    return asks


def _answer(future: Future[Any], who: str) -> Any:
    """Return what was answered. Raises what was raised, and TimeoutError where nothing has been answered by now."""
    if not future.done():
        raise TimeoutError(f"{who} did not answer within {distance(ANSWERS_WITHIN)}")
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise RuntimeError(f"{who} raised {type(error).__name__}") from error
    return future.result()


def _ask(kind: ServerType, begun: Mapping[int, Future[Any]]) -> _Ask:
    row = ledger.targets().filter(type=kind.name).first()
    wanted = row.wanted if row else kind.policy.minimum
    try:
        # Whatever a source returns is its own trouble, and that of no other type.
        loads = [_load_of(source, begun[id(source)]) for source in kind.sources]
        load = sum(loads[1:], loads[0])
        answer = asked(load, kind.policy, wanted)
    except Exception as error:
        trouble = f"its load can't be told: {told(error)}"
        if _is_news(trouble, kind.name):
            logger.error(
                "The load of the server type %s can't be told, and its count stays as it is.\n%s",
                kind.name,
                traced(error),
            )
        return _Ask(trouble=trouble)
    if answer is None:
        return _Ask(load=load, loads=loads, trouble="its load does not tell what its rules ask for")
    count, why = answer
    silent = (kind.policy.waiting_per_server is not None and any(each.waiting is None for each in loads)) or (
        bool(kind.policy.waited) and any(each.oldest is None and each.waiting != 0 for each in loads)
    )
    if silent and count < wanted:
        # What one queue does not tell may be much.
        return _Ask(wanted, f"{why}, and not every source tells all: no fewer than now", load, loads)
    return _Ask(count, why, load, loads)


def _load_of(source: Source, begun: Future[Any]) -> Load:
    name = types.name_of(source)
    load: object = _answer(begun, name)
    if not isinstance(load, Load):
        raise TypeError(f"{name} should return a Load, such as Load(waiting=12), not {load!r}.")
    return load


def _decide(
    name: str, kind: ServerType | None, ask: _Ask, busy: Mapping[str, int] | None, now: datetime, *, dry: bool
) -> Decision:
    """Decide for one type, and keep the decision; again, where somebody else has decided meanwhile."""
    for _ in range(_TRIES):
        row = ledger.targets().filter(type=name).first() if dry else ledger.target(name)
        standing = ledger.standing(row) if row else Standing(0)
        if kind is None and (left := planner.left_alone(row, now)):
            return Decision(standing, left)
        if kind is None:
            return Decision(Standing(0), "this type is not registered any more")
        if ask.asked is None:
            why = _stays(ask.trouble) if ask.trouble else (row.why if row else "") or "nothing was asked for"
            return Decision(standing, why)
        gap = _GAP * conf.load().monitor_every
        decision = decide(ask.asked, ask.why, standing, types.bounded(kind), now, gap=gap)
        if dry or row is None:
            return decision
        if ledger.decide(row, decision.standing, decision.why, busy=busy, now=now):
            return decision
    raise RuntimeError(f"What is wanted of the type {name!r} was changed {_TRIES} times by others meanwhile.")


def _stays(trouble: str) -> str:
    return f"{trouble}; it stays as it is"


def _is_news(trouble: str, *types: str) -> bool:
    """Say whether this trouble is not written down yet: while it stays the same, it is logged once."""
    last = [ledger.last_decision(type) for type in types]
    return not any(decision is not None and decision.why == _stays(trouble) for decision in last)


def _busy(loads: Sequence[Load], servers: Collection[str]) -> dict[str, int] | None:
    """
    Return how many jobs each of these servers runs, as far as it is known; None where nobody told a load.

    One that not every load names is idle only where each load tells what runs, and those that are named have all of it:
    workers may bear other names than their servers, and a queue that does not tell may have them do anything.
    """
    if not loads:
        return None
    busy = {}
    for name in servers:
        jobs = sum(load.busy.get(name, 0) for load in loads)
        if jobs or all(name in load.busy for load in loads):
            busy[name] = jobs
    running = [load.running for load in loads if load.running is not None]
    if len(running) == len(loads) and sum(busy.values()) >= sum(running):
        busy = {name: busy.get(name, 0) for name in servers}
    return busy


def _as_json(load: Load | None) -> dict[str, Any]:
    if load is None:
        return {}
    values = asdict(load)
    values["oldest"] = None if load.oldest is None else load.oldest.total_seconds()
    return {key: value for key, value in values.items() if value not in (None, {})}
