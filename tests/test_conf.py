"""The one setting: defaults that are safe, and a clear word for what is wrong."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import pytest
from django.test import override_settings

from multiserver_schedule import conf
from multiserver_schedule.exceptions import ConfigurationError


def load(**given: Any) -> conf.Settings:
    with override_settings(MULTISERVER_SCHEDULE=given):
        return conf.load()


def test_an_empty_project_needs_no_setting() -> None:
    settings = load()
    assert settings.lease == timedelta(seconds=30) and settings.heartbeat == timedelta(seconds=10)
    assert settings.server_name == socket.gethostname()
    assert settings.locks["default"].backend.endswith("ORMLock")


def test_the_zone_of_the_schedule_is_the_projects_unless_it_is_set() -> None:
    with override_settings(TIME_ZONE="Europe/Berlin"):
        assert load().time_zone == "Europe/Berlin"
        assert load(TIME_ZONE="Asia/Tokyo").time_zone == "Asia/Tokyo"


def test_settings_are_read_when_asked_for_and_not_at_import() -> None:
    assert load(MAX_CONCURRENCY=7).max_concurrency == 7
    assert load().max_concurrency == 4


def test_none_means_the_default() -> None:
    settings = load(MIN_BREAK=None, CATCH_UP=None, TIME_ZONE=None, ENVIRONMENT=None, SERVER_NAME=None)
    assert settings == load()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"LEASES": timedelta(seconds=3)}, "Did you mean 'LEASE'?"),
        ({"XYZZY": 1}, "Options are: ABANDONED_AFTER"),
        ({"LEASE": 30}, "should be a timedelta, not 30"),
        ({"LEASE": timedelta(0)}, "longer than zero"),
        ({"HEARTBEAT": timedelta(seconds=20)}, "at most half of LEASE"),
        ({"MIN_BREAK": timedelta(seconds=-1)}, "zero or longer"),
        ({"MAX_CONCURRENCY": 0}, "a whole number from 1 up"),
        ({"MAX_CONCURRENCY": True}, "a whole number from 1 up"),
        ({"HISTORY_DAYS": 1_000_000}, "'HISTORY_DAYS'] should be a whole number from 0 to 36500, not 1000000."),
        ({"HISTORY_RUNS": -1}, "a whole number from 0 up"),
        ({"HOUSEKEEPING": "no"}, "should be True or False, not 'no'"),
        ({"HOUSEKEEPING": 0}, "should be True or False, not 0"),
        ({"HOUSEKEEPIN": True}, "Did you mean 'HOUSEKEEPING'?"),
        ({"RUNNER": "thread"}, "one of 'auto', 'fork', 'spawn', 'inline'"),
        ({"LOG_LEVEL": "DEBUG"}, "one of 'none', 'abandoned', 'conflicts', 'verbose'"),
        ({"TIME_ZONE": "Mars/Olympus"}, "'Mars/Olympus' is not a known time zone"),
        ({"SERVER_NAME": "a@b"}, "no '@'"),
        ({"LOCKS": []}, "should be a dict"),
        ({"LOCKS": {"default": {}}}, "with a 'BACKEND'"),
        ({"LOCKS": {"default": {"BACKEND": "x", "OPTION": {}}}}, "Did you mean 'OPTIONS'?"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_write(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says.replace("?", r"\?").replace("(", r"\(")) as raised:
        load(**given)
    assert "MULTISERVER_SCHEDULE" in str(raised.value)


def test_a_lock_that_is_added_leaves_the_default_one_in_place() -> None:
    locks = load(LOCKS={"cache": {"BACKEND": "x.y.Z", "OPTIONS": {"cache": "default"}}}).locks
    assert set(locks) == {"default", "cache"}


def test_a_maintenance_mode_that_cannot_be_imported_names_the_setting_where_it_is_asked() -> None:
    with pytest.raises(ConfigurationError, match=r"^MULTISERVER_SCHEDULE\['MAINTENANCE_MODE'\] 'shop.nope' cannot be"):
        conf.is_in_maintenance("shop.nope")
