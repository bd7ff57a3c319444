"""The settings of a project that works with django-tasks-db."""

from __future__ import annotations

import os

from tests.servers import database_settings

SECRET_KEY = "not a secret: tests only"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_tasks_db"]
DATABASES = {"default": database_settings(os.environ["DATABASE_URL"])}
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
