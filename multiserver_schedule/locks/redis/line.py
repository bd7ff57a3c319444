"""
How does a step get to the primary of a cache alias, and what do its errors mean?

Over one connection, made from the alias's settings, whichever backend it has, with time limits of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final, cast
from urllib.parse import urlsplit

import redis
from django.core.cache import caches
from django.core.cache.backends.base import InvalidCacheBackendError
from django.core.cache.backends.redis import RedisCache
from django.utils.module_loading import import_string
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

try:
    from redis.maint_notifications import MaintNotificationsConfig
except ImportError:  # an older redis-py
    MaintNotificationsConfig = None  # type: ignore[assignment,misc]

from ...exceptions import ConfigurationError, StoreRefused, StoreTimeout

_SCRIPT: Final = resources.files(__package__).joinpath("steps.lua").read_text(encoding="utf-8")
_SHA: Final = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

_ERRORS: Final[Mapping[str, type[Exception]]] = {
    "READONLY": ReadOnlyError,
    "MASTERDOWN": MasterDownError,
    "OOM": OutOfMemoryError,
    "NOPERM": NoPermissionError,
    "MOVED": MovedError,
    "ASK": AskError,
    "TRYAGAIN": TryAgainError,
    "CLUSTERDOWN": ClusterDownError,
    "CROSSSLOT": ClusterCrossSlotError,
}
_FORBIDDEN: Final = re.compile("no permissions to|can't run this command|can't access at least one of the keys")
"""How servers say inside a script that the user may not do something: each in words of its own."""
_OF_THE_POOL: Final = (
    "cache",
    "cache_config",
    "connection_pool",
    "event_dispatcher",
    "himport_registry",
    "maint_notifications_config",
    "maint_notifications_pool_handler",
    "maintenance_notification_hash",
    "maintenance_state",
    "max_connections",
    "orig_host_address",
    "orig_socket_connect_timeout",
    "orig_socket_timeout",
    "oss_cluster_maint_notifications_handler",
)
"""What a pool puts into its connections' settings for itself."""


class Line:
    """
    One connection to the primary of a cache alias, by which the steps of the script are called.

    No pool, and no repetition but these two: a call on a connection that the server has closed meanwhile, and a claim
    whose answer was lost, are sent once again on a new one. Every step is idempotent.
    """

    def __init__(self, lock: str, cache: str, timeout: float) -> None:
        self.lock = lock
        self.cache = cache
        self.timeout = timeout
        try:
            backend = caches[cache]
        except InvalidCacheBackendError as error:
            raise ConfigurationError(f"The lock {lock!r} cannot use the cache {cache!r}: {error}") from error
        if not isinstance(backend, RedisCache) and not hasattr(backend, "client"):
            raise ConfigurationError(
                f"The lock {lock!r} needs Redis or Valkey, and CACHES[{cache!r}] is {type(backend).__module__}."
                f"{type(backend).__qualname__}. Give it the backend django_redis.cache.RedisCache, or "
                "django.core.cache.backends.redis.RedisCache."
            )
        # The braces keep all keys of one lock in one slot of a cluster. A KEY_FUNCTION makes the beginning of each key.
        self.base = str(backend.make_key(f"multiserver_schedule:{{{lock}}}:"))
        self.is_calling = False
        self.is_unanswered = False
        """Was something sent by the last call that got no answer?"""
        self._one_at_a_time = threading.Lock()
        self._connection: Any = None
        self._own_pool: Any = None
        """Kept alive: a connection by sentinels refers to its pool weakly."""
        self._opened_by = 0
        self._node: tuple[str, int] | None = None
        """Where a cluster has the keys, when that is not where LOCATION says."""
        self._was_cut = False

    @property
    def place(self) -> str:
        """The server, for people: no password in it."""
        location = caches.settings[self.cache].get("LOCATION", "")
        first = _first(location)
        url = urlsplit(first)
        if url.scheme and "@" in url.netloc:
            first = first.replace(url.netloc, url.netloc.rpartition("@")[2])
        return f"the Redis server of CACHES[{self.cache!r}] (LOCATION {first.partition('?')[0]!r})"

    def call(self, step: str, *, again: bool = False, **given: Any) -> Any:
        """Run one step; ``again``: send it once more when the answer does not come."""
        text = json.dumps(given, separators=(",", ":"))
        with self._one_at_a_time:
            self._was_cut = False
            self.is_unanswered = False
            self.is_calling = True
            try:
                return self._call(step, text, again)
            except (RedisError, OSError, ValueError) as error:
                # Another thread that shuts the socket makes a driver say many things.
                if self._was_cut:
                    raise StoreTimeout(
                        f"A call to {self.place} hung, and was cut. The next one opens a connection of its own."
                    ) from error
                raise
            finally:
                self.is_calling = False

    def _call(self, step: str, text: str, again: bool) -> Any:
        may_repeat, may_move = True, True
        while True:
            was_open = self._connection is not None and self._opened_by == os.getpid()
            is_sent = False
            try:
                connection = self._connected()
                is_sent = True
                return self._eval(connection, step, text)
            except (RedisConnectionError, RedisTimeoutError) as error:
                self.close()
                self._node = None
                self.is_unanswered |= is_sent
                # The server may have closed an idle connection; a time limit that has passed tells nothing of that.
                was_closed = was_open and isinstance(error, RedisConnectionError)
                if self._was_cut or not may_repeat or not is_sent or not (again or was_closed):
                    self._explain(error)
                    raise
                may_repeat = False
            except ResponseError as error:
                moved = re.match(r"(?:MOVED )?\d+ (\S*):(\d+)$", str(error)) if _is(error, "MOVED") else None
                if moved is None or not may_move:
                    self._explain(error)
                    raise
                may_move = False
                # No name for the node: the one that was asked, by another port.
                host = getattr(self._connection, "host", "") if moved[1] in ("", "?") else moved[1]
                self.close()
                self._node = (host, int(moved[2]))
            except BaseException:
                # A signal handler's exception, too: half a call is on the line.
                self.close()
                self.is_unanswered |= is_sent
                raise

    def _eval(self, connection: Any, step: str, text: str) -> Any:
        connection.send_command("EVALSHA", _SHA, 1, self.base, step, text)
        try:
            return connection.read_response()
        except NoScriptError:
            # Not LOAD and then EVALSHA again: a SCRIPT FLUSH may fall in between.
            connection.send_command("EVAL", _SCRIPT, 1, self.base, step, text)
            return connection.read_response()

    def _connected(self) -> Any:
        if self._connection is not None and self._opened_by != os.getpid():
            # Inherited by a fork: the other process goes on using it.
            self._connection = None
        if self._connection is None:
            self._opened_by = os.getpid()
            self._connection = self._new_connection()
        if self._connection._sock is None:
            self._connection.connect()
        return self._connection

    def _new_connection(self) -> Any:
        pool = self._pool()
        kwargs = {key: value for key, value in pool.connection_kwargs.items() if key not in _OF_THE_POOL}
        kwargs.update(
            decode_responses=True,
            encoding="utf-8",
            encoding_errors="strict",
            socket_timeout=self.timeout,
            socket_connect_timeout=self.timeout,
            retry=Retry(cast(Any, NoBackoff)(), 0),
            retry_on_timeout=False,
            retry_on_error=[],
            health_check_interval=0,
            client_name="multiserver_schedule",
            max_connections=1,
        )
        if MaintNotificationsConfig is not None:
            # A server's notices would lengthen the time limits.
            kwargs["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
        kind: Any = pool.connection_class
        if self._node is not None:
            kwargs.pop("path", None)
            kwargs.update(host=self._node[0], port=self._node[1])
            if issubclass(kind, redis.UnixDomainSocketConnection):
                kind = redis.Connection
        elif isinstance(pool, SentinelConnectionPool):
            named: Any = SentinelConnectionPool
            self._own_pool = named(
                pool.service_name, self._sentinel(pool.sentinel_manager), connection_class=kind, **kwargs
            )
            return self._own_pool.make_connection()
        own: Any = redis.ConnectionPool
        self._own_pool = own(connection_class=kind, **kwargs)
        return self._own_pool.make_connection()

    def _pool(self) -> Any:
        """Return the pool that the alias itself uses for writing, or one like it: its settings are what is wanted."""
        backend: Any = caches[self.cache]
        if not isinstance(backend, RedisCache):
            try:
                return backend.client.get_client(True).connection_pool
            except (AttributeError, TypeError, NotImplementedError) as error:
                raise ConfigurationError(
                    f"The lock {self.lock!r} finds no connection in CACHES[{self.cache!r}] "
                    f"({type(backend.client).__qualname__}): it needs a client of one primary, not of shards."
                ) from error
        settings = caches.settings[self.cache]
        options = {
            key: value for key, value in settings.get("OPTIONS", {}).items() if key not in ("serializer", "pool_class")
        }
        if isinstance(options.get("parser_class"), str):
            options["parser_class"] = import_string(options["parser_class"])
        pool: Any = redis.ConnectionPool
        return pool.from_url(_first(settings.get("LOCATION", "")), **options)

    def _sentinel(self, manager: Any) -> Any:
        """Return the same sentinels, asked within our time limits."""
        kwargs = {
            **manager.sentinel_kwargs,
            "socket_timeout": self.timeout,
            "socket_connect_timeout": self.timeout,
        }
        addresses = [client.connection_pool.connection_kwargs for client in manager.sentinels]
        sentinel: Any = Sentinel
        return sentinel(
            [(address["host"], address["port"]) for address in addresses],
            min_other_sentinels=manager.min_other_sentinels,
            sentinel_kwargs=kwargs,
        )

    def _explain(self, error: RedisError) -> None:
        """Raise an error that says what to do about it, where that is known."""
        said = str(error)
        if _is(error, "READONLY", "MASTERDOWN") or "lock-on-replica" in said or "previous master is now" in said:
            raise StoreRefused(
                f"The lock {self.lock!r} needs the primary, and {self.place} is a read-only replica, or the primary it "
                "follows is away. Name the primary first in LOCATION."
            ) from error
        if _is(error, "OOM"):
            raise StoreRefused(
                f"The memory of {self.place} is full (maxmemory): the lock {self.lock!r} can claim nothing. Runs under "
                "way keep their leases. Give it more memory, or an instance of its own."
            ) from error
        if _is(error, "NOPERM") or _FORBIDDEN.search(said):
            raise StoreRefused(
                f"The Redis user of CACHES[{self.cache!r}] may not do what the lock {self.lock!r} needs ({said}). It "
                f"needs +eval +evalsha +info +time +@hash +@sortedset +@set +del +client|setname, and ~{self.base}*."
            ) from error
        if "lock-on-old-server" in said:
            version = re.search(r"lock-on-old-server:([\d.?]+)", said)
            raise StoreRefused(
                f"The lock {self.lock!r} needs Redis 6 or newer, or Valkey, and {self.place} is "
                f"{version[1] if version else 'older'}."
            ) from error
        if _is(error, "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "CROSSSLOT"):
            raise StoreRefused(
                f"The cluster of the lock {self.lock!r} is being changed, or is down ({type(error).__name__}: {said}): "
                f"{self.place} cannot serve its keys now. The next call tries again."
            ) from error

    def cut(self) -> bool:
        """Shut the socket of the call under way, from another thread; False when there is none."""
        connection = self._connection
        sock = getattr(connection, "_sock", None)
        if not self.is_calling or sock is None:
            return False
        try:
            # The copy is ours: closing it cannot close a descriptor that the driver has meanwhile given up.
            with socket.socket(fileno=os.dup(sock.fileno())) as line:
                self._was_cut = True
                line.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._opened_by == os.getpid():
            connection.disconnect()


def _first(location: Any) -> str:
    """Return the primary of a LOCATION: the first of a list, or of a text with several."""
    if not isinstance(location, str):
        return str(next(iter(location), ""))
    return re.split("[;,]", location)[0]


def _is(error: Exception, *codes: str) -> bool:
    """Is this one of these errors of Redis, as a driver knows it, or as it comes out of a script?"""
    said = str(error)
    return any(isinstance(error, _ERRORS[code]) or said.startswith(f"{code} ") or f"-{code} " in said for code in codes)
