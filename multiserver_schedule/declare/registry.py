"""
Everything that has been declared: what waits for its module to be imported, and the finished tasks.

A declaration is a chain of calls that nobody announces the end of; its module has an end. So drafts are kept by module,
and become tasks all at once when it has been imported, or not at all.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, MappingProxyType

from django.apps import apps

from .. import conf
from ..entries import ScheduledTask
from ..exceptions import DeclarationError
from .draft import Draft
from .sources import NEVER_REGISTERED, find_lines

Origin = tuple[str, bool]
"""A module, and whether its import declared (a reload replaces that) or a later call, as from ``ready()``."""


class _Batch:
    """The drafts of one execution of a module, recognised by its code, which each execution loads anew."""

    __slots__ = ("code", "drafts")

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.drafts: list[Draft] = []


class Registry:
    """The declarations of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._clear()

    def _clear(self) -> None:
        self._pending: dict[Origin, _Batch] = {}
        self._by_origin: dict[Origin, list[ScheduledTask]] = {}
        self._tasks: dict[str, ScheduledTask] = {}
        self._folded: dict[str, ScheduledTask] = {}
        self._digests: dict[str, tuple[str, str]] = {}

    @property
    def tasks(self) -> Mapping[str, ScheduledTask]:
        """
        The tasks by name, read-only, in the order of their declaration.

        Completes what was declared outside discovery (a models.py, a ``ready()``); raises DeclarationError where that
        cannot be completed, each time anew.
        """
        if self._pending:
            self.complete_all()
        return MappingProxyType(self._tasks)

    @property
    def completed(self) -> Mapping[str, ScheduledTask]:
        """The tasks that are complete by now, for ``check``: what is broken elsewhere raises nothing here."""
        return MappingProxyType(self._tasks)

    def declare(self, draft: Draft) -> None:
        """Keep a declaration until its module has been imported."""
        source = draft.source
        if source.module in NEVER_REGISTERED:
            return
        origin = source.module, source.importing
        batch = self._pending.get(origin)
        if batch is None or (source.importing and batch.code is not source.code):
            # Another code object is another execution: what the one before declared was never completed (it failed, or
            # the module was reloaded at once).
            batch = self._pending[origin] = _Batch(source.code)
        batch.drafts.append(draft)

    def complete(self, module: str) -> list[ScheduledTask]:
        """
        Turn the declarations of this module into tasks, all or none, and return them; a reload replaces them.

        Raises DeclarationError with all that is wrong in them; they stay pending, so that asking again raises again.
        """
        with self._lock:
            return [task for importing in (True, False) for task in self._complete((module, importing))]

    def complete_each(self) -> list[tuple[str, DeclarationError]]:
        """Complete every module that is not just being imported; return those that cannot be, with the errors."""
        wrong: list[tuple[str, DeclarationError]] = []
        with self._lock:
            for origin in list(self._pending):
                try:
                    self._complete(origin)
                except DeclarationError as error:
                    wrong.append((origin[0], error))
        return wrong

    def complete_all(self) -> None:
        """Complete every module that is not just being imported. Raises DeclarationError with all that is wrong."""
        if wrong := self.complete_each():
            raise DeclarationError("\n".join(str(error) for _, error in wrong))

    def digests(self, server: str, tasks: Mapping[str, ScheduledTask] | None = None) -> tuple[str, str]:
        """
        Return what tells this set of declarations (by default: all) from another: name and schedule of every task.

        The first, 64 hex digits, is of the tasks that have one row for all servers; the second of those on every
        server, for this one ("" when there are none).
        """
        if tasks is not None:
            return _digests(server, tasks)
        declared = self.tasks
        with self._lock:
            if server not in self._digests:
                self._digests[server] = _digests(server, declared)
            return self._digests[server]

    @contextmanager
    def set_aside(self) -> Iterator[Registry]:
        """Be empty for as long as this lasts, for tests; what was declared before is back after it."""
        with self._lock:
            before = self._pending, self._by_origin, self._tasks, self._folded, self._digests
            self._clear()
        try:
            yield self
        finally:
            with self._lock:
                self._pending, self._by_origin, self._tasks, self._folded, self._digests = before

    def _complete(self, origin: Origin) -> list[ScheduledTask]:
        batch = self._pending.get(origin)
        module, importing = origin
        if batch is None or _is_being_imported(module):
            return []
        if importing and module not in sys.modules:
            # Python takes a module that raises out again; whoever lives with that gets nothing of it.
            del self._pending[origin]
            return []
        replaced = self._by_origin.get(origin, []) if importing else []
        tasks = self._finish(batch.drafts, module, {id(task) for task in replaced})
        for task in replaced:
            del self._tasks[task.name]
            del self._folded[task.name.casefold()]
        for task in tasks:
            self._tasks[task.name] = task
            self._folded[task.name.casefold()] = task
        for draft in batch.drafts:
            draft.complete = True
        self._by_origin[origin] = tasks if importing else self._by_origin.get(origin, []) + tasks
        self._digests.clear()
        del self._pending[origin]
        return tasks

    def _finish(self, drafts: list[Draft], module: str, replaced: set[int]) -> list[ScheduledTask]:
        find_lines(draft.source for draft in drafts)
        settings, label = conf.load(), label_of(module)
        seen: dict[str, ScheduledTask] = {}
        wrong: list[str] = []
        for draft in drafts:
            try:
                task = draft.finish(label, settings)
            except DeclarationError as error:
                wrong.append(str(error))
                continue
            folded = task.name.casefold()
            other = seen.get(folded) or self._folded.get(folded)
            if other is not None and id(other) not in replaced:
                wrong.append(_duplicate(task, other))
            seen[folded] = task
        if wrong:
            raise DeclarationError("\n".join(wrong))
        return list(seen.values())


def label_of(module: str) -> str:
    """Return what the names of this module's tasks start with: its app's label, else its package's last component."""
    app = apps.get_containing_app_config(module)
    return app.label if app is not None else (module.rpartition(".")[0] or module).rpartition(".")[2]


def _is_being_imported(module: str) -> bool:
    # The import system's own mark, which it sets for as long as a module's code runs for the first time.
    return bool(getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False))


def _duplicate(task: ScheduledTask, other: ScheduledTask) -> str:
    here, there = f"{task.file}:{task.line}", f"{other.file}:{other.line}"
    if here == there and task.module != other.module:
        why = f"one file is imported as {other.module} and as {task.module}. Import it under one name."
    else:
        same = "the same name" if task.name == other.name else f"the name {other.name!r}, which differs only by case,"
        why = f'{there} has {same} already. Give one of them another with .name("…").'
    return f"{here}: task {task.name!r}: {why}"


def _digests(server: str, tasks: Mapping[str, ScheduledTask]) -> tuple[str, str]:
    shared = [task for task in tasks.values() if not task.on_every_server]
    own = [task for task in tasks.values() if task.on_every_server]
    return _digest("", shared), _digest(server, own) if own else ""


def _digest(server: str, tasks: list[ScheduledTask]) -> str:
    lines = sorted(f"{task.name} {task.fingerprint}" for task in tasks)
    return hashlib.sha256("\n".join([server, *lines]).encode()).hexdigest()
