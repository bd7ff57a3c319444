"""What the verbs of ``manage.py servers`` print: lines of at most 80 columns that read well without colour."""

from __future__ import annotations

from collections.abc import Iterator
from zoneinfo import ZoneInfo

from multiserver_schedule.logs import distance
from multiserver_schedule.management.tables import at, wrapped
from multiserver_schedule.operate import words

from ..entries import Load
from ..monitor import Monitored
from ..operate import Line, ProviderLine, TypeLine, words_of_stranded


def of_type(line: TypeLine, zone: ZoneInfo) -> Iterator[str]:
    """Return one type of ``servers list``: what is wanted, what there is, and why."""
    yield f"type {line.name}"
    counts = [f"{line.wanted} wanted", f"{line.running} running"]
    if line.provisioned > line.running:
        counts.append(f"{line.provisioned - line.running} on the way")
    if line.leaving:
        counts.append(f"{line.leaving} leaving")
    if line.errored:
        counts.append(f"{line.errored} failed")
    if line.maximum is not None or line.minimum:
        counts.append(f"{line.minimum} to {'any number' if line.maximum is None else line.maximum} allowed")
    yield from wrapped([", ".join(counts)])
    if not line.registered:
        yield from wrapped([line.left_alone or "not registered in this version of the project: none is wanted"])
    if line.decided_at:
        asked = "" if line.asked is None else f", {line.asked} asked for"
        yield from wrapped([f"decided {at(line.decided_at, zone)} by {line.decided_by}{asked}: {line.decided_why}"])
    elif line.why:
        yield from wrapped([f"since {at(line.changed_at, zone)}: {line.why}"])
    if line.short_because:
        yield from wrapped([f"SHORT since {at(line.short_since, zone)}: {line.short_because}"])


def of_server(line: Line, zone: ZoneInfo) -> Iterator[str]:
    """Return one server of ``servers list``: how it stands, where it is, why it exists, what went wrong."""
    yield line.name
    jobs = [] if line.jobs is None else [f"{line.jobs} job{'' if line.jobs == 1 else 's'}"]
    asked = ["a reboot is asked for"] if line.reboot_requested_at else []
    yield from wrapped([f"{line.status} since {at(line.since, zone)}", f"{distance(line.age)} old", *jobs, *asked])
    where = [f"at {line.provider}", *filter(None, [line.machine, line.address])]
    if line.missing_since and not line.deleted_at:
        where.append(f"its machine is missing since {at(line.missing_since, zone)}")
    yield from wrapped(where)
    if line.why:
        yield from wrapped([f"why: {line.why}"])
    if line.reason and line.reason != line.why:
        yield from wrapped([f"then: {line.reason}"])
    if line.error or line.failed_as:
        said = line.error or "it did not answer in time"
        failed = f"{line.failed_as or 'error'}: {said}"
        more = [f"{line.attempts} failed attempt{'' if line.attempts == 1 else 's'}"] if line.attempts else []
        if line.next_step_at:
            more.append(f"next step {at(line.next_step_at, zone)}")
        yield from wrapped([failed, *more])


def of_provider(line: ProviderLine, zone: ZoneInfo) -> Iterator[str]:
    """Return one provider of ``servers list``: how full it is, and how it does."""
    yield f"provider {line.name}"
    places = f"{line.used} of {line.limit} places" if line.configured else f"{line.used} machines, not in the settings"
    parts = [places]
    if line.unknown:
        parts.append(f"{line.unknown} of them not ours")
    if line.observed_at:
        parts.append(f"last answer {at(line.observed_at, zone)}")
    yield from wrapped(parts)
    if line.used and not line.configured:
        yield from wrapped([words_of_stranded(line.name, line.used)])
    if line.trouble and line.configured:
        yield from wrapped([f"NO ANSWER since {at(line.trouble_since, zone)}: {line.trouble}"])
    if line.not_before and line.not_before > line.as_of:
        yield from wrapped([f"nothing is created there before {at(line.not_before, zone)}"])
    for orphan in line.orphans:
        why = f"it is {orphan['server']} at {orphan.get('provider')}" if "server" in orphan else "it has no server"
        yield from wrapped([f"left alone, since {why}: {orphan.get('id')} {orphan.get('name', '')}".rstrip()])


def of_decision(done: Monitored) -> Iterator[str]:
    """Return what was decided for a type, up or down, or would be, and what that means for servers."""
    change = (
        f"{done.wanted} wanted, as before" if done.wanted == done.before else f"{done.before} → {done.wanted} wanted"
    )
    yield f"type {done.type}: {change}"
    asked = [] if done.asked is None else [f"{done.asked} asked for"]
    yield from wrapped([*asked, *([f"load: {load}"] if (load := of_load(done.load)) else []), f"why: {done.why}"])
    for create in done.plan.creates:
        yield from wrapped([f"+ create one at {create.provider}: {create.why}"])
    for cancel in done.plan.cancels:
        yield from wrapped([f"- give up {cancel.name}: {cancel.why}"])
    for drain in done.plan.drains:
        yield from wrapped([f"- drain {drain.name}: {drain.why}"])
    if done.plan.short:
        yield from wrapped([f"! {done.plan.short.missing} cannot be made: {done.plan.short.why}"])
    if not (done.plan.creates or done.plan.cancels or done.plan.drains or done.plan.short):
        yield from wrapped(["nothing to do"])


def of_load(load: Load | None) -> str:
    """Say how much work waits, as far as the source could tell."""
    if load is None:
        return ""
    parts = [] if load.waiting is None else [f"{load.waiting} waiting"]
    if load.oldest is not None and load.waiting != 0:
        parts.append(f"the oldest for {words.of_span(load.oldest)}")
    if load.running is not None:
        parts.append(f"{load.running} running")
    return ", ".join(parts)
