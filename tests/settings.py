"""
The project that the tests run in.

A process that a test starts gets its database by DATABASE_URL. The tests' own process has one alias for each store that
can be tested here; ``conftest`` starts the servers when a test first needs them, and fills in where they are.
"""

from __future__ import annotations

import os

from . import stores
from .servers import database_settings

SECRET_KEY = "not a secret: tests only"
USE_TZ = True
TIME_ZONE = "UTC"
ROOT_URLCONF = "tests.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ALLOWED_HOSTS = ["*"]
STATIC_URL = "static/"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "multiserver_schedule",
    "multiserver_schedule.servers",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
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
# Where a test says otherwise, conftest sees to it.
MULTISERVER_SCHEDULE = {"HOUSEKEEPING": False}
# The default hasher is slow on purpose.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

if os.environ.get("DATABASE_URL"):
    DATABASES = {"default": database_settings(os.environ["DATABASE_URL"])}
else:
    DATABASES = {"default": database_settings("sqlite:///:memory:")}
    for _name in ("postgresql", "mariadb"):
        if not stores.missing(_name):
            _scheme = {"mariadb": "mysql"}.get(_name, _name)
            DATABASES[stores.ALIASES[_name]] = database_settings(
                stores.given_url(_name) or f"{_scheme}://not-started@127.0.0.1:1/not-started"
            )
