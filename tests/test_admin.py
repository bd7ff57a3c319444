"""The admin shows everything, to the second, changes nothing, and frees a lock for whoever may."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from html import unescape
from typing import Any

import pytest
from django.apps import apps
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connections
from django.test import Client
from django.urls import reverse

from multiserver_schedule import schedule
from multiserver_schedule.declare import registry
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun

from .test_operate import AWAY, BOARD, Board, cleanups_heard, in_cache, in_database

THREE = datetime(2030, 1, 1, 3, 0, 7, tzinfo=timezone.utc)
MODELS = ("scheduledlock", "scheduledrun", "cleanuplog")


@pytest.fixture
def browser(db: None) -> Client:
    ScheduledLock.objects.create(task="a.b", last_due_at=THREE, schedule_since=THREE, not_before=THREE)
    ScheduledRun.objects.create(task="a.b", due_at=THREE, status="failed", output="<script>alert(1)</script>")
    CleanupLog.objects.create(task="a.b", owner="x", fence=1, cleaned_at=THREE, cleaned_by="web1", reason="overran")
    client = Client()
    client.force_login(User.objects.create_superuser("anna"))
    return client


@pytest.mark.parametrize("model", MODELS)
def test_the_lists_are_shown_to_the_second(browser: Client, model: str) -> None:
    page = browser.get(reverse(f"admin:multiserver_schedule_{model}_changelist")).content.decode()
    assert "a.b" in page
    assert "2030-01-01 03:00:07" in page


@pytest.mark.parametrize("model", MODELS)
def test_nothing_can_be_added_changed_or_deleted_by_hand(browser: Client, model: str) -> None:
    assert browser.get(reverse(f"admin:multiserver_schedule_{model}_add")).status_code == 403
    pk = apps.get_model("multiserver_schedule", model).objects.get().pk
    assert browser.post(reverse(f"admin:multiserver_schedule_{model}_delete", args=[pk])).status_code == 403
    page = browser.get(reverse(f"admin:multiserver_schedule_{model}_change", args=[pk])).content.decode()
    assert "Close" in page
    assert 'name="_save"' not in page


def test_what_a_task_printed_is_shown_escaped(browser: Client) -> None:
    pk = ScheduledRun.objects.get().pk
    page = browser.get(reverse("admin:multiserver_schedule_scheduledrun_change", args=[pk])).content.decode()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


# -- the locks of all stores ------------------------------------------------------------------------------------------

SECOND = timedelta(seconds=1)
STORES = "/admin/multiserver_schedule/scheduledlock/stores/"
RELEASE = f"{STORES}release/"


@pytest.fixture
def stores(settings: Any, transactional_db: None) -> Iterator[None]:
    """Have a task in the database and one in a store of another kind."""
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": BOARD}}
    Board.held.clear()
    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().name("a.orm")
        schedule.call("time.sleep", 0).daily().name("a.cached").lock_with("cache")
        yield


def browser_of(*permissions: str, **options: Any) -> Client:
    """Return the browser of a member of staff with these permissions."""
    anna = User.objects.create_user("anna", is_staff=True)
    for permission in permissions:
        anna.user_permissions.add(Permission.objects.get(codename=permission))
    client = Client(**options)
    client.force_login(anna)
    return client


@pytest.fixture
def anna(stores: None) -> Client:
    """Return the browser of somebody who may see the locks and release them."""
    return browser_of("view_scheduledlock", "release_scheduledlock")


def text_of(page: Any) -> str:
    """Return what one reads on a page."""
    assert page.status_code == 200, page
    shown = re.sub(r"<(style|script)\b.*?</\1>", "", page.content.decode(), flags=re.S)
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", shown)))


def post(client: Client, name: str, **given: str) -> str:
    """Release a lock, and return what is said then."""
    return text_of(client.post(RELEASE, {"task": name, **given}, follow=True))


def test_the_locks_of_all_stores_are_on_one_page_the_held_ones_first(anna: Client) -> None:
    in_database(renewed=SECOND)
    in_cache()
    ScheduledRun.objects.create(task="a.orm", due_at=THREE, status="timed_out", reason="after an hour")
    page = anna.get(STORES)
    row = r"a\.orm default running web9 [\d-]+ [\d:]+ until [\d:]+ [\d-]+ [\d:]+ timed out \(after an hour\), "
    assert re.search(row + r"2030-01-01 03:00:07 Release a\.cached cache ready", text_of(page))
    assert page.content.decode().count(f'href="{RELEASE}?') == 1


def test_the_page_is_found_from_the_list_and_from_the_apps_index(anna: Client) -> None:
    for place in ("/admin/multiserver_schedule/scheduledlock/", "/admin/multiserver_schedule/"):
        assert f'href="{STORES}"' in anna.get(place).content.decode(), place


def test_a_store_that_is_down_is_said_to_be_and_hides_no_other(anna: Client, settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    in_database(renewed=SECOND)
    page = text_of(anna.get(STORES))
    assert "The lock 'cache' does not answer: ConnectionError: Connection refused" in page
    assert "a.cached cache unknown: ConnectionError" in page
    assert "a.orm default running" in page


def test_what_a_store_says_is_shown_escaped(anna: Client) -> None:
    in_cache("<script>alert(1)</script>", renewed=31 * SECOND, server="<b>web9</b>")
    for place in (STORES, f"{RELEASE}?task=%3Cscript%3Ealert(1)%3C/script%3E&lock=cache"):
        page = anna.get(place).content.decode()
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;b&gt;web9&lt;/b&gt;" in page
        assert "<script>alert" not in page and "<b>web9" not in page


def test_a_page_has_a_hundred_tasks(anna: Client) -> None:
    for number in range(101):
        in_cache(f"b.task{number:03}")
    assert "b.task000" in text_of(anna.get(STORES)) and "103 tasks Next" in text_of(anna.get(STORES))
    assert "Previous 103 tasks" in text_of(anna.get(STORES, {"p": "2"}))
    assert anna.get(STORES, {"p": "no number"}).status_code == 200


def test_before_a_lock_is_released_one_is_asked_and_told_what_happens(anna: Client) -> None:
    in_cache(renewed=31 * SECOND)
    page = anna.get(RELEASE, {"task": "a.cached", "lock": "cache"})
    assert "The lock of a.cached (in cache ) is held by web9 ." in text_of(page)
    assert "web9 has stopped renewing its lease." in text_of(page)
    assert "The due time that was being run is not run again." in text_of(page)
    assert 'name="force"' not in page.content.decode()
    assert Board.held["a.cached"].owner is not None


def test_one_is_warned_of_a_holder_that_looks_alive(anna: Client) -> None:
    in_cache(renewed=SECOND)
    page = anna.get(RELEASE, {"task": "a.cached", "lock": "cache"})
    assert "web9 looks alive." in text_of(page) and "it would run twice at once" in text_of(page)
    assert 'name="force"' in page.content.decode()


@pytest.mark.parametrize("name", ["a.orm", "a.cached"])
def test_a_lock_is_released_recorded_told_and_logged(anna: Client, name: str) -> None:
    (in_database if name == "a.orm" else in_cache)(name, renewed=31 * SECOND)
    lock = "default" if name == "a.orm" else "cache"
    form = anna.get(RELEASE, {"task": name, "lock": lock}).content.decode()
    given = dict(re.findall(r'<input type="hidden" name="(task|lock|owner)" value="([^"]*)">', form))
    assert set(given) == {"task", "lock", "owner"}
    with cleanups_heard() as told:
        said = post(anna, given.pop("task"), **given)
    assert f"Released the lock of {name} (in {lock}), which web9 had held." in said
    log = CleanupLog.objects.get()
    assert (log.task, log.reason) == (name, "released_by_hand")
    assert [each["cleanup"] for each in told] == [log]
    entry = LogEntry.objects.get()
    assert entry.user.username == "anna"
    assert entry.change_message == f"Released the lock of {name} (in {lock}), which web9 had held."
    assert entry.object_repr == name
    # A task that is locked in a cache has no row that the entry could be of.
    assert entry.object_id == (str(ScheduledLock.objects.get().pk) if name == "a.orm" else None)
    assert name in text_of(anna.get("/admin/"))


def test_a_holder_that_looks_alive_is_robbed_by_the_box_alone(anna: Client) -> None:
    in_cache(renewed=SECOND)
    assert "looks alive" in post(anna, "a.cached", lock="cache", owner="an-owner")
    assert Board.held["a.cached"].owner is not None
    assert not LogEntry.objects.exists()
    assert "Released the lock" in post(anna, "a.cached", lock="cache", owner="an-owner", force="yes")
    assert LogEntry.objects.get().change_message.endswith(" By force.")


def test_whoever_took_the_lock_since_the_page_was_shown_keeps_it(anna: Client) -> None:
    in_cache(renewed=31 * SECOND, owner="a-new-owner")
    said = post(anna, "a.cached", lock="cache", owner="an-owner", force="yes")
    assert "not held by the run that you saw any more" in said
    assert Board.held["a.cached"].owner == "a-new-owner"


def test_a_lock_that_was_freed_since_is_said_to_be(anna: Client) -> None:
    in_cache()
    for page in (
        anna.get(RELEASE, {"task": "a.cached"}, follow=True),
        anna.post(RELEASE, {"task": "a.cached"}, follow=True),
    ):
        assert "Nobody holds the lock of a.cached" in text_of(page)


def test_looking_releases_nothing(anna: Client) -> None:
    in_cache(renewed=31 * SECOND)
    for method in (anna.get, anna.head, anna.put, anna.delete):
        method(f"{RELEASE}?task=a.cached&lock=cache&force=yes&owner=an-owner")
    assert Board.held["a.cached"].owner is not None


def test_a_forged_post_releases_nothing(stores: None) -> None:
    in_cache(renewed=31 * SECOND)
    forged = browser_of("view_scheduledlock", "release_scheduledlock", enforce_csrf_checks=True)
    assert forged.post(RELEASE, {"task": "a.cached", "lock": "cache"}).status_code == 403
    assert Board.held["a.cached"].owner is not None


def test_who_may_only_look_cannot_release(stores: None) -> None:
    in_cache(renewed=31 * SECOND)
    looker = browser_of("view_scheduledlock")
    page = looker.get(STORES)
    assert "web9" in text_of(page) and RELEASE not in page.content.decode()
    assert looker.get(RELEASE, {"task": "a.cached"}).status_code == 403
    assert looker.post(RELEASE, {"task": "a.cached"}).status_code == 403
    assert Board.held["a.cached"].owner is not None


@pytest.mark.parametrize("permissions", [[], ["view_cleanuplog"], ["release_scheduledlock"]])
def test_who_may_not_see_the_locks_sees_no_page(stores: None, permissions: list[str]) -> None:
    in_cache(renewed=31 * SECOND)
    stranger = browser_of(*permissions)
    assert stranger.get(STORES).status_code == 403
    assert stranger.post(RELEASE, {"task": "a.cached"}).status_code == 403
    assert Board.held["a.cached"].owner is not None
    assert STORES not in stranger.get("/admin/multiserver_schedule/").content.decode()


def test_who_is_not_logged_in_is_asked_to(stores: None) -> None:
    assert Client().get(STORES)["Location"].startswith("/admin/login/")


def test_it_works_where_each_request_is_a_transaction(anna: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
    in_database(renewed=31 * SECOND)
    assert "a.orm default stale" in text_of(anna.get(STORES))
    assert "Released the lock of a.orm" in post(anna, "a.orm", lock="default")


def test_a_project_that_does_not_register_our_locks_has_its_index(anna: Client) -> None:
    model_admin = admin.site._registry.pop(ScheduledLock)
    try:
        assert anna.get("/admin/").status_code == 200
    finally:
        admin.site._registry[ScheduledLock] = model_admin


# -- pause, resume, run now -------------------------------------------------------------------------------------------

PAUSE, RESUME, RUN = f"{STORES}pause/", f"{STORES}resume/", f"{STORES}run/"
MAY = ("view_scheduledlock", "pause_scheduledlock", "trigger_scheduledlock")


def do(client: Client, place: str, **given: Any) -> str:
    """Post, and return what is said then."""
    return text_of(client.post(place, given, follow=True))


def test_a_task_is_paused_with_a_reason_and_resumed(stores: None) -> None:
    in_database()
    anna = browser_of(*MAY)
    page = anna.get(PAUSE, {"task": "a.orm", "lock": "default"})
    assert "a.orm (in default)" in text_of(page) and 'name="reason"' in page.content.decode()
    assert ScheduledLock.objects.get().paused_at is None
    assert "Paused: a.orm" in do(anna, PAUSE, task="a.orm", lock="default", reason="the bank is down")
    lock = ScheduledLock.objects.get()
    assert lock.paused_at is not None and lock.paused_reason == "the bank is down"
    shown = text_of(anna.get(STORES))
    assert re.search(r"a\.orm default paused since [\d-]+ [\d:]+ : the bank is down - ", shown)
    assert "Resumed: a.orm" in do(anna, RESUME, task="a.orm", lock="default")
    assert ScheduledLock.objects.get().paused_at is None
    said = list(LogEntry.objects.order_by("pk").values_list("object_repr", "object_id", "change_message"))
    assert said == [
        ("a.orm", str(lock.pk), "Paused, in default. (the bank is down)"),
        ("a.orm", str(lock.pk), "Resumed, in default."),
    ]


def test_everything_is_paused_and_resumed(stores: None, settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1"}
    in_database()
    anna = browser_of(*MAY)
    assert "Everything, in all locks" in text_of(anna.get(PAUSE, {"all": "yes"}))
    assert "Paused: everything" in do(anna, PAUSE, all="yes", reason="deploy of v7")
    shown = text_of(anna.get(STORES))
    assert "Everything is paused in default." in shown and "deploy of v7" in shown
    assert f'href="{RESUME}?all=yes"' in anna.get(STORES).content.decode()
    assert "Resumed: everything" in do(anna, RESUME, all="yes")
    assert "Everything is paused" not in text_of(anna.get(STORES))
    assert [entry.object_repr for entry in LogEntry.objects.all()] == ["everything", "everything"]


def test_run_now_is_asked_for_and_never_run_in_the_request(stores: None) -> None:
    """django-apscheduler runs it in the request, for as long as that may take."""
    in_database()
    anna = browser_of(*MAY)
    anna.get(RUN, {"task": "a.orm", "lock": "default"})
    assert ScheduledLock.objects.get().wanted_at is None
    said = do(anna, RUN, task="a.orm", lock="default")
    assert "A run of a.orm is asked for: the next service or pass that looks starts it." in said
    assert ScheduledLock.objects.get().wanted_at is not None
    assert not ScheduledRun.objects.exists()
    assert "a run is asked for since" in text_of(anna.get(STORES))
    assert LogEntry.objects.get().change_message == "Asked for a run, in default."


def test_what_is_paused_is_not_offered_to_be_run_and_refused_if_it_is(stores: None) -> None:
    in_database(paused_at=THREE, paused_reason="the bank is down")
    anna = browser_of(*MAY)
    assert RUN not in anna.get(STORES).content.decode()
    assert "a.orm is paused (the bank is down)" in do(anna, RUN, task="a.orm", lock="default")
    assert not LogEntry.objects.exists()


def test_a_retry_that_is_owed_is_shown(stores: None) -> None:
    in_database(retry_at=THREE, attempt=2)
    assert "ready attempt 2 of 2 at 2030-01-01 03:00:07" in text_of(browser_of(*MAY).get(STORES))


def test_what_nobody_starts_is_shown_as_overdue(stores: None) -> None:
    in_database(next_due_at=THREE.replace(year=2020))
    assert "overdue since 2020-01-01 03:00:07" in text_of(browser_of(*MAY).get(STORES))


@pytest.mark.parametrize("action", ["pause", "resume", "run"])
def test_several_are_chosen_in_the_list_and_asked_about_once(stores: None, action: str) -> None:
    for name in ("a.orm", "a.cached", "a.third"):
        in_database(name)
    anna = browser_of(*MAY)
    chosen = [str(lock.pk) for lock in ScheduledLock.objects.filter(task__in=["a.orm", "a.third"])]
    given = {"action": f"{action}_selected", "_selected_action": chosen}
    page = anna.post("/admin/multiserver_schedule/scheduledlock/", given, follow=True)
    assert page.redirect_chain == [(f"{STORES}{action}/?task=a.orm&task=a.third", 302)]
    assert re.search(r"a\.orm +a\.third", text_of(page))
    assert not ScheduledLock.objects.exclude(paused_at=None, wanted_at=None).exists()


def test_of_several_that_are_asked_to_run_each_is_logged(stores: None) -> None:
    schedule.call("time.sleep", 0).daily().name("a.third")
    in_database("a.orm")
    in_database("a.third")
    said = do(browser_of(*MAY), RUN, task=["a.orm", "a.third"])
    assert "Runs of a.orm, a.third are asked for" in said
    assert LogEntry.objects.count() == 2


@pytest.mark.parametrize(("place", "missing"), [(PAUSE, "pause"), (RESUME, "pause"), (RUN, "trigger")])
def test_each_has_a_permission_of_its_own(stores: None, place: str, missing: str) -> None:
    in_database()
    bella = browser_of(*(each for each in MAY if not each.startswith(missing)), "release_scheduledlock")
    assert bella.get(place, {"task": "a.orm"}).status_code == 403
    assert bella.post(place, {"task": "a.orm"}).status_code == 403
    shown = bella.get(STORES).content.decode()
    assert place not in shown
    listed = bella.get("/admin/multiserver_schedule/scheduledlock/").content.decode()
    action = place.removeprefix(STORES).strip("/")
    assert f'value="{action}_selected"' not in listed
    given = {"action": f"{action}_selected", "_selected_action": [str(ScheduledLock.objects.get().pk)]}
    bella.post("/admin/multiserver_schedule/scheduledlock/", given)
    lock = ScheduledLock.objects.get()
    assert (lock.paused_at, lock.wanted_at) == (None, None)


def test_who_may_not_see_the_locks_steers_nothing(stores: None) -> None:
    in_database()
    stranger = browser_of("pause_scheduledlock", "trigger_scheduledlock")
    for place in (PAUSE, RESUME, RUN):
        assert stranger.post(place, {"task": "a.orm"}).status_code == 403


@pytest.mark.parametrize("place", [PAUSE, RESUME, RUN])
def test_looking_and_forged_posts_steer_nothing(stores: None, place: str) -> None:
    in_database(paused_at=THREE) if place == RESUME else in_database()
    before = ScheduledLock.objects.values().get()
    forged = browser_of(*MAY, enforce_csrf_checks=True)
    for method in (forged.get, forged.head, forged.put, forged.delete):
        method(f"{place}?task=a.orm&lock=default&reason=x")
    assert forged.post(place, {"task": "a.orm", "lock": "default"}).status_code == 403
    assert ScheduledLock.objects.values().get() == before


def test_what_is_chosen_by_nobody_is_refused(stores: None) -> None:
    assert "No task was chosen." in do(browser_of(*MAY), PAUSE)


def test_an_unknown_task_and_a_store_that_is_down_are_said_to_be(stores: None, settings: Any) -> None:
    in_database()
    anna = browser_of(*MAY)
    assert "No task is named 'a.orn'. Did you mean a.orm?" in do(anna, PAUSE, task="a.orn")
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": AWAY}}
    said = do(anna, PAUSE, all="yes")
    assert "Paused: everything" in said and "The lock 'cache' does not answer" in said


def test_a_reason_is_shown_escaped(stores: None) -> None:
    in_database()
    anna = browser_of(*MAY)
    do(anna, PAUSE, task="a.orm", reason="<script>alert(1)</script>")
    for place in (STORES, "/admin/multiserver_schedule/scheduledlock/", f"{PAUSE}?task=%3Cscript%3Ealert(1)"):
        page = anna.get(place).content.decode()
        assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page


def test_steering_works_where_each_request_is_a_transaction(stores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
    in_database()
    anna = browser_of(*MAY)
    assert "Paused: a.orm" in do(anna, PAUSE, task="a.orm")
    assert "Resumed: a.orm" in do(anna, RESUME, task="a.orm")
    assert "A run of a.orm is asked for" in do(anna, RUN, task="a.orm")
