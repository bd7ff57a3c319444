"""
The example project: SQLite by default; another database by DATABASE_URL, a Redis by REDIS_URL.

    DATABASE_URL=postgresql://user:password@127.0.0.1:5432/example
    DATABASE_URL=mysql://user:password@127.0.0.1:3306/example
"""

import os
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = "an example's key, which protects nothing"
DEBUG = True
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
USE_TZ = True
TIME_ZONE = os.environ.get("TIME_ZONE", "UTC")
ROOT_URLCONF = "example.urls"
STATIC_URL = "static/"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "multiserver_schedule",
    "shop",
    "reports",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]


def database(url: str) -> dict[str, object]:
    """Return Django's settings of the database at ``url``."""
    engines = {"postgresql": "postgresql", "postgres": "postgresql", "mysql": "mysql", "sqlite": "sqlite3"}
    parts = urlsplit(url)
    if parts.scheme not in engines:
        raise ValueError(f"DATABASE_URL {url!r} should begin with one of: {', '.join(engines)}.")
    name = unquote(parts.path.removeprefix("/"))
    return {
        "ENGINE": f"django.db.backends.{engines[parts.scheme]}",
        "NAME": name,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": str(parts.port or ""),
    }


DATABASES = {"default": database(os.environ.get("DATABASE_URL", f"sqlite:///{BASE_DIR / 'db.sqlite3'}"))}
if "REDIS_URL" in os.environ:
    CACHES = {"default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": os.environ["REDIS_URL"]}}

MULTISERVER_SCHEDULE = {
    # On real servers there is nothing to set: the name of the machine serves.
    "SERVER_NAME": os.environ.get("SERVER_NAME"),
    # The demo shortens the lease, so that a killed server is replaced while one watches; thirty seconds are usual.
    "LEASE": timedelta(seconds=float(os.environ.get("SCHEDULE_LEASE", "30"))),
    "HEARTBEAT": timedelta(seconds=float(os.environ.get("SCHEDULE_LEASE", "30")) / 3),
}

# Its tasks are due every few seconds, so that there is something to watch: a pass stays for its whole minute, as meant.
SILENCED_SYSTEM_CHECKS = ["multiserver_schedule.W002"]

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"multiserver_schedule": {"handlers": ["console"], "level": "INFO"}},
}
