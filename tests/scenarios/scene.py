"""A fleet with a project of its own, a record of who died when, and a wire that can be cut."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from django.db import connections

from multiserver_schedule.models import ScheduledLock

from ..fleet.harness import Fleet, Process, Started, is_alive
from ..fleet.journal import Line, boot
from ..stores import ROOT, Store

HEALTHY = "healthy"


class Scene(Fleet):
    """Servers that run ``tests/scenarios/projects/<project>/schedule.py``."""

    def __init__(
        self, store: Store, tmp_path: Path, project: str, *, env: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        chosen = {"DJANGO_SETTINGS_MODULE": "tests.scenarios.settings", **(env or {})}
        super().__init__(store, tmp_path, project, env=chosen, **more)

    def command(self, server: str, *arguments: str, env: Mapping[str, str] | None = None) -> Started:
        """Start ``manage.py`` with these arguments on a server."""
        output = self.output_of(server)
        with output.open("ab") as file:
            started = subprocess.Popen(
                [sys.executable, "-m", "django", *arguments],
                env=self.environ(server, env=env),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = Started(self, server, started, output)
        self.add(process)
        return process

    def started(self, task: str, **having: Any) -> list[Line]:
        """Return the starts of a task so far."""
        return self.journal.of("start", task=task, **having)

    def wait_for_start(self, task: str, **having: Any) -> Line:
        """Wait for the first start of a task."""
        return self.wait_for(lambda: self.started(task, **having), f"{task} to start")[0]

    def wait_for_end_of(self, processes: Iterable[Process]) -> None:
        """Wait for the end of these keepers."""
        for process in processes:
            process.wait()

    def make_due(self, names: Iterable[str] | None = None, due_at: datetime | None = None) -> datetime:
        """As the fleet's; by default for tasks that are due on the first of January."""
        new_year = self.now().replace(month=1, day=1, hour=0, minute=0, second=0, microsecond=0)
        return super().make_due(names, due_at or new_year)

    def take(self, task: str, server: str, since: datetime, expires_at: datetime) -> None:
        """Have a server hold a task's lock that nobody has renewed since."""
        rows = ScheduledLock.objects.using(self.store.alias).filter(task=task)
        times = {"acquired_at": since, "renewed_at": since, "expires_at": expires_at}
        rows.update(owner=str(uuid.uuid4()), server=server, fence=1, **times)

    def boot_of(self, moment: datetime) -> float:
        """Return the boot time at which the database's clock says this."""
        at, now = self.pair()
        return at + (moment - now).total_seconds()

    def nothing_is_left_of(self, *servers: str) -> bool:
        """Is there no process left that one of these servers started, at any remove?"""
        wanted = {f"FLEET_SERVER={server}".encode() for server in servers}
        for pid in self.mine():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
                if wanted & set(environ.read().split(b"\0")):
                    return False
        return True


class Deaths:
    """Watches processes, and notes the boot time at which each was found dead (a stopped one is alive)."""

    def __init__(self) -> None:
        self.at: dict[int, float] = {}
        self._watched: dict[int, int] = {}
        self._poll = select.poll()
        self._thread: threading.Thread | None = None
        self._over = False

    def watch(self, *pids: int) -> None:
        """Begin to watch these."""
        for pid in pids:
            try:
                file = os.pidfd_open(pid)
            except ProcessLookupError:
                self.at[pid] = boot()
                continue
            self._watched[file] = pid
            self._poll.register(file, select.POLLIN)

    def __enter__(self) -> Deaths:
        self._thread = threading.Thread(target=self._run, name="deaths")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        assert self._thread is not None
        self._thread.join()
        for file in self._watched:
            os.close(file)

    def _run(self) -> None:
        while not self._over:
            ended = self._poll.poll(20)
            now = boot()
            for file, _ in ended:
                self._poll.unregister(file)
                self.at[self._watched[file]] = now

    def are_gone(self, *pids: int) -> bool:
        """Are all of these dead, and is it noted when those died that are watched?"""
        watched = {*self._watched.values()}
        return all(pid in self.at or (pid not in watched and not is_alive(pid)) for pid in pids)


class Wire:
    """A TCP proxy in front of a database server, whose connections can be frozen: nothing passes, nothing closes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._server = parts.hostname, parts.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}"))
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._frozen: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="wire")

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._thread.join()
        self._listener.close()
        for one in self._pairs:
            one.close()

    def backends(self, store: Store) -> list[int]:
        """Return the processes of PostgreSQL that serve what goes through this wire."""
        with self._lock:
            ports = [one.getsockname()[1] for one in self._pairs if one.getpeername() == self._server]
        with connections[store.alias].cursor() as cursor:
            cursor.execute("SELECT pid FROM pg_stat_activity WHERE client_port = ANY(%s)", [ports])
            return [pid for (pid,) in cursor.fetchall()]

    def freeze(self) -> int:
        """Let nothing pass any more on the connections that there are; return how many. New ones are not frozen."""
        with self._lock:
            self._frozen |= set(self._pairs)
            return len(self._pairs) // 2

    def _run(self) -> None:
        while not self._over:
            with self._lock:
                listened = [self._listener, *(one for one in self._pairs if one not in self._frozen)]
            for one in select.select(listened, (), (), 0.02)[0]:
                if one is self._listener:
                    ours, _ = self._listener.accept()
                    theirs = socket.create_connection(self._server)
                    with self._lock:
                        self._pairs |= {ours: theirs, theirs: ours}
                    continue
                with self._lock:
                    if one not in self._pairs or one in self._frozen:
                        continue
                    other = self._pairs[one]
                try:
                    chunk = one.recv(1 << 16)
                    if chunk:
                        other.sendall(chunk)
                except OSError:
                    chunk = b""
                if not chunk:
                    with self._lock:
                        del self._pairs[one], self._pairs[other]
                    one.close()
                    other.close()
