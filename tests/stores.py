"""Which stores this run of the tests covers, and why not the others."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from . import servers

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("sqlite", "postgresql", "mariadb")
ALIASES = {"sqlite": "default", "postgresql": "postgresql", "mariadb": "mariadb"}
DRIVERS = {"postgresql": "psycopg", "mariadb": "MySQLdb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A database that a test is run on: ready, migrated, empty."""

    name: str
    """sqlite, postgresql or mariadb."""
    alias: str
    """Its alias in this process."""
    vendor: str
    """Django's word for it: sqlite, postgresql or mysql."""
    url: str
    """For the DATABASE_URL of another process: the same test database, there the alias "default"."""
    server: servers.Server | None
    """To freeze and thaw; None for SQLite, and for a server that was given by its URL."""

    def environ(self, **more: str) -> dict[str, str]:
        """Return the environment of a process that shall work on this database."""
        return {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "DATABASE_URL": self.url,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **more,
        }


def asked() -> list[str]:
    """Return what TEST_STORES names: databases, and caches of ``caches.NAMES``."""
    return [name.strip() for name in os.environ.get("TEST_STORES", "").split(",") if name.strip()]


def chosen(names: tuple[str, ...] = NAMES) -> tuple[str, ...]:
    """Return those of these stores that TEST_STORES names (all, when it is not set)."""
    return tuple(name for name in names if name in asked() or not asked())


def given_url(name: str) -> str:
    """Return the URL of a server that is already running, e.g. by ``python -m tests.servers``."""
    return os.environ.get(f"TEST_{name.upper()}_URL", "")


def missing(name: str) -> str:
    """Return why this store cannot be tested here, or "" when it can."""
    if name not in chosen():
        return "not in TEST_STORES"
    if name == "sqlite":
        return ""
    if importlib.util.find_spec(DRIVERS[name]) is None:
        return f"no Python driver {DRIVERS[name]}"
    return "" if given_url(name) else servers.missing(name)


def url_of(settings: dict[str, object]) -> str:
    """Return the DATABASE_URL of a connection's settings."""
    if settings["ENGINE"] == "django.db.backends.sqlite3":
        return f"sqlite:///{quote(str(settings['NAME']))}"
    scheme = str(settings["ENGINE"]).rpartition(".")[2]
    user, password = quote(str(settings["USER"]), safe=""), quote(str(settings["PASSWORD"]), safe="")
    return f"{scheme}://{user}:{password}@{settings['HOST']}:{settings['PORT']}/{quote(str(settings['NAME']), safe='')}"
