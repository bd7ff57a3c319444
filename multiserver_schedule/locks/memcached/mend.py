"""What is lost, what is out of step with these declarations, and in which steps is it put right?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ... import conf
from ...entries import ScheduledTask
from ..base import Before, Declarations
from ..cached import longest_lease
from ..versions import FORGOTTEN_AFTER, TakeOver, keys, newest_of, registered, take_overs
from .items import Items
from .rows import (
    STATE,
    Directory,
    Kept,
    Moment,
    Read,
    directory_of,
    from_row,
    length,
    micros,
    micros_or_none,
    row_key,
    scope_of,
    state_of,
    time_of,
    time_or_none,
    versions_of,
    was_restarted,
)
from .steps import blank, filled, held_back, is_out_of_step, rescheduled, usable


@dataclass(slots=True)
class Findings:
    """What is not as this version needs it; ``sync`` puts it right."""

    directory: Directory
    held: dict[str, ScheduledTask]
    """By row: the tasks whose schedule this version's is."""
    lost: list[str]
    """Named in the directory, now or before, and without a row."""
    missing: list[str]
    """Held, neither named nor there: new, or lost with everything."""
    off: list[str]
    """Held, and there with another schedule, or with none."""
    unnamed: list[str]
    """There, and not named in the directory."""

    @property
    def is_fine(self) -> bool:
        """Is there nothing to be put right?"""
        return self.directory.is_whole and not (self.lost or self.missing or self.off or self.unnamed)


@dataclass(slots=True)
class Writes:
    """Rows that ``sync`` is about to write, by name, and what is to be said of each that is written."""

    rows: dict[str, Kept] = field(default_factory=dict)
    registered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: dict[str, datetime | None] = field(default_factory=dict)
    trouble: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Done:
    """What ``sync`` has done so far."""

    registered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: dict[str, datetime | None] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    until: int = 0
    """What is lost counts as done until then."""
    began_empty: bool = False

    def note(self, trouble: str) -> None:
        """Remember how something was lost."""
        if trouble not in self.trouble:
            self.trouble.append(trouble)

    def add(self, writes: Writes, written: set[str], moment: Moment) -> None:
        """Remember what is to be said of those rows that were written."""
        self.registered += [name for name in writes.registered if name in written]
        self.changed += [name for name in writes.changed if name in written]
        lost = {name: last for name, last in writes.lost.items() if name in written}
        if lost:
            self.lost.update(lost)
            self.until = moment.past
        for name, trouble in writes.trouble.items():
            if name in written:
                self.note(trouble)


class Mending:
    """Puts the items of one lock right, as the versions declare them that ask for it."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self.longest = conf.load().lease
        """The longest lease: so long may an owner that was lost take to come back."""
        self._fingerprints: tuple[object, dict[str, str]] = (None, {})

    def to_ask_of(self, declared: Declarations, read: Read) -> list[str]:
        """Return the rows of which more may be known elsewhere: those that are missing, empty or given away."""
        state = read.get(STATE) or {}
        changes = take_overs(declared, versions_of(state, declared.server), time_of(read.moment.lower))
        asked = [name for change in changes for name in change.tasks if (read.row(name) or {}).get("moved_to")]
        found = self.findings(declared, read, state, [change.key for change in changes])
        empty = [name for name in found.off if not (read.row(name) or {}).get("fingerprint")]
        return [*asked, *found.missing, *(name for name in found.lost if name in found.held), *empty]

    def put_right(self, declared: Declarations, before: Mapping[str, Before], read: Read, done: Done) -> bool:
        """
        Do one round of ``MemcachedLock.sync``, of which these are the steps; return False where it must begin anew.

        1. A restarted server: hold all rows, and count everything until now as done.
        2. Take back what was given away, if this version takes over. Not after the state: whoever died in between would
           leave it with no store at all, since nobody takes back what a newer version gave away.
        3. Write the state: from here on this version is the newest. Whoever dies now leaves rows that do not fit it,
           and the next look of any process of this version finds them.
        4. Register what is missing, take over what has another schedule. A lost row of a task that this version does
           not hold becomes a blank one, which the version that holds it fills.
        5. Add the names to the directory: after the rows, so that a name without a row has lost it.
        """
        moment = read.moment
        self._prints(declared)
        kept = read.get(STATE)
        if kept is not None and was_restarted(kept, moment):
            self._hold_all(declared, read, kept, done)
            return False
        changes = take_overs(declared, versions_of(kept or {}, declared.server), time_of(moment.lower))
        state = self._adopted(changes, kept, read, done)
        since = {scope: state["versions"].get(key, {}).get("since") for key, scope in keys(declared).items()}
        tasks = {name: task for change in changes for name, task in change.tasks.items()}
        moved = {name: task for name, task in tasks.items() if (read.row(name) or {}).get("moved_to")}
        writes = Writes()
        self._take_over(moved, since, before, read, writes)
        if not self._put(read, writes, done):
            return False
        if state != kept and not self._items.write(read, {STATE: state})[STATE]:
            return False
        found = self.findings(declared, read, state)
        if not found.directory.is_whole and state["since"] + length(self.longest) <= moment.lower:
            done.note("the list of its rows was lost")
        writes = Writes()
        self._register(found, before, read, state, writes, began_empty=done.began_empty)
        self._take_over({name: found.held[name] for name in found.off}, since, before, read, writes)
        if not self._put(read, writes, done):
            return False
        names = {*writes.rows, *found.unnamed} - found.directory.names.keys()
        return self._items.add_names(read, found.directory, names)

    def _adopted(self, changes: Sequence[TakeOver], kept: Kept | None, read: Read, done: Done) -> Kept:
        """Return the state (``kept`` as it is there) with these versions as the newest, and note if it was lost."""
        versions = dict((kept or {}).get("versions") or {})
        if not versions:
            # It is not there; or it was lost, and somebody has paused everything since.
            others = read.found.keys() - {STATE}
            done.began_empty = done.began_empty or not others
            if not done.began_empty:
                done.note("its state was lost, and with it what was paused")
        for change in changes:
            versions[change.key] = {
                "scope": change.scope,
                "first_seen_at": micros(change.first_seen_at),
                "seen_at": read.moment.lower,
                "since": micros_or_none(change.since),
            }
        old = read.moment.lower - length(FORGOTTEN_AFTER)
        left = {key: version for key, version in versions.items() if version["seen_at"] >= old}
        return {**(kept or state_of(read.moment)), "versions": left}

    def _put(self, read: Read, writes: Writes, done: Done) -> bool:
        """Write these rows, and note what is to be said of them; False where somebody else changed one."""
        stored = self._items.write(read, {row_key(name): kept for name, kept in writes.rows.items()})
        done.add(writes, {name for name in writes.rows if stored[row_key(name)]}, read.moment)
        return all(stored.values())

    def _register(
        self,
        found: Findings,
        before: Mapping[str, Before],
        read: Read,
        state: Kept,
        writes: Writes,
        *,
        began_empty: bool,
    ) -> None:
        moment = read.moment
        longest = length(self.longest)
        # Not for longer than that, should the server's clock have been ahead at that time.
        emptied = min(state["since"], moment.upper) + longest
        trouble = "the store was empty" if began_empty else "rows were lost"
        for name in (*found.missing, *found.lost):
            task = found.held.get(name)
            if task is None:
                writes.rows[name] = blank(name, moment, self.longest)
                writes.trouble[name] = trouble
                continue
            was_named = name in found.directory.names or name in self._items.names
            known = usable(before.get(name))
            last = None if known is None else known.last_due_at
            is_lost = (known is None or known.row is None) and (was_named or last is not None)
            # The store may have been emptied while the task ran: what was due until now counts as done.
            is_done = is_lost or emptied > moment.lower
            kept = from_row(registered(name, task, time_of(moment.past if is_done else moment.lower), known))
            if is_lost or was_named:
                kept["hold_until"] = moment.upper + longest
            elif is_done:
                kept["hold_until"] = emptied
            if is_done:
                kept["fence"] = max(kept["fence"], moment.past)
            if scope_of(name):
                # It may have been forgotten in this second, in which its last fence was given out.
                kept["fence"] = max(kept["fence"], moment.upper)
            if is_lost and not self._was_forgotten(name, last, found, state):
                writes.lost[name] = last
                writes.trouble[name] = trouble
            writes.rows[name] = kept
            writes.registered.append(name)

    def _was_forgotten(self, name: str, last: datetime | None, found: Findings, state: Kept) -> bool:
        """Is it the row of a server that was taken for gone, and no loss? It ran since the store was emptied last."""
        if not scope_of(name) or name in found.directory.names or name in self._items.names:
            return False
        return found.directory.is_whole and last is not None and micros(last) > state["since"]

    def _take_over(
        self,
        tasks: Mapping[str, ScheduledTask],
        since: Mapping[str, int | None],
        before: Mapping[str, Before],
        read: Read,
        writes: Writes,
    ) -> None:
        for name, task in tasks.items():
            kept = read.row(name)
            assert kept is not None
            if kept["fingerprint"]:
                back = time_or_none(since[scope_of(name)])
                writes.rows[name] = rescheduled(kept, task, back, before.get(name), read.moment)
                if not kept.get("blank"):
                    writes.changed.append(name)
                continue
            known = usable(before.get(name), kept)
            writes.rows[name] = filled(kept, task, known, read.moment, self.longest)
            if known is None or known.row is None:
                writes.lost[name] = None if known is None else known.last_due_at
                writes.trouble[name] = "rows were lost"

    def _hold_all(self, declared: Declarations, read: Read, state: Kept, done: Done) -> None:
        """Hold the rows of a server that was restarted and kept its items (``-e``), then note which run it is."""
        moment = read.moment
        new: dict[str, Kept] = {}
        for key, kept in read.rows():
            task = declared.task_of(kept["task"])
            new[key] = held_back(kept, task, moment, self.longest)
        stored = self._items.write(read, new)
        for key, kept in read.rows():
            if stored[key]:
                done.lost.setdefault(kept["task"], time_of(kept["last_due_at"]))
        done.note("the Memcached server was restarted")
        done.until = moment.past
        if all(stored.values()):
            self._items.write(read, {STATE: state_of(moment, state)})

    def findings(self, declared: Declarations, read: Read, state: Kept, taken: Sequence[str] = ()) -> Findings:
        """Compare what was read with what is declared; versions with the keys ``taken`` are about to be the newest."""
        directory = directory_of(read)
        versions = versions_of(state, declared.server)
        names = declared.rows
        scopes = set()
        for key, scope in keys(declared).items():
            newest = newest_of(versions, scope)
            if key in taken or (newest is not None and newest.key == key):
                scopes.add(scope)
        held = {name: task for name, task in names.items() if scope_of(name) in scopes}
        prints = self._prints(declared)
        lost = [name for name in directory.names | self._items.names if row_key(name) not in read.found]
        missing: list[str] = []
        off: list[str] = []
        for name in held:
            kept = read.row(name)
            if kept is None:
                if name not in directory.names and name not in self._items.names:
                    missing.append(name)
            elif is_out_of_step(kept, prints[name]):
                off.append(name)
        known = {**names, **dict.fromkeys(self._items.names)}
        unnamed = [name for name in known if name not in directory.names and row_key(name) in read.found]
        return Findings(directory, held, lost, missing, off, unnamed)

    def _prints(self, declared: Declarations) -> dict[str, str]:
        # Ten thousand hashes at each look would be most of it.
        given = (declared.digest, declared.server_digest, declared.server)
        if self._fingerprints[0] != given:
            found = {name: task.fingerprint for name, task in declared.rows.items()}
            self._fingerprints = (given, found)
            self.longest = longest_lease(declared)
        return self._fingerprints[1]
