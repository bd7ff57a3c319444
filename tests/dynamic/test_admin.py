"""The admin shows the fleet and why it is as it is, asks before it ends anything, and says no secret."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from html import unescape
from typing import Any
from xml.etree import ElementTree

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.contrib.messages import get_messages
from django.db import connections
from django.test import Client

from multiserver_schedule.servers import conf, fleet, ledger, operate, types
from multiserver_schedule.servers.exceptions import FleetError
from multiserver_schedule.servers.models import Decision, Provider, Server, Target
from multiserver_schedule.servers.states import Status

from ..test_admin import browser_of, text_of
from .fleets import NOWHERE, again, decided, make, transitions_of

pytestmark = pytest.mark.django_db

ADMIN = "/admin/multiserver_schedule_servers/"
SERVERS, TARGETS = f"{ADMIN}server/", f"{ADMIN}target/"
ACT = {verb: f"{SERVERS}{verb}/" for verb in ("drain", "reboot", "retire", "retry")}
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
SECRET = "hunter2-and-more"


@pytest.fixture(autouse=True)
def _fleet(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "HOUSEKEEPING": False}
    settings.MULTISERVER_SCHEDULE_SERVERS = {
        "FLEET": "test",
        "PROVIDERS": {"a": {"BACKEND": NOWHERE, "MAX_SERVERS": 4, "OPTIONS": {"TOKEN": SECRET}}},
    }


@pytest.fixture
def root() -> Client:
    """Return the browser of somebody who may do everything."""
    client = Client()
    client.force_login(User.objects.create_superuser("anna"))
    return client


@pytest.fixture
def anna() -> Client:
    """Return the browser of somebody who may see servers, and do everything to them."""
    return browser_of("view_server", *(f"{verb}_server" for verb in ACT))


def page_of(server: Server) -> str:
    return f"{SERVERS}{server.pk}/change/"


def rows_of(page: Any) -> list[str]:
    """Return the names in a list of servers."""
    return re.findall(r'<th class="field-name"><a [^>]*>([^<]*)</a>', page.content.decode())


# -- look -------------------------------------------------------------------------------------------------------------


def test_the_list_shows_how_each_server_stands_and_why_it_exists(root: Client) -> None:
    created_at = ledger.now() - 5 * HOUR
    make("default-1", Status.DRAINING, since=2 * HOUR, created_at=created_at, jobs=3, error="timed out")
    shown = text_of(root.get(SERVERS))
    assert "default-1 default a draining for 2 h 5 h 3 2 are wanted, and 1 is there timed out" in shown


def test_what_is_deleted_is_shown_only_to_who_asks_for_it(root: Client) -> None:
    for status in Status:
        make(f"s-{status}", status)
    every = {f"s-{status}" for status in Status}
    assert set(rows_of(root.get(SERVERS))) == every - {"s-deleted"}
    assert set(rows_of(root.get(SERVERS, {"status": "deleted"}))) == {"s-deleted"}
    assert set(rows_of(root.get(SERVERS, {"status": "stopped"}))) == {"s-stopped"}
    assert set(rows_of(root.get(SERVERS, {"status": "all"}))) == every
    assert "All but deleted" in text_of(root.get(SERVERS))


def test_a_server_has_its_story_on_its_page(root: Client) -> None:
    server = make("default-1")
    assert ledger.move(server, Status.DRAINING, "1 is wanted", now=ledger.now())
    assert ledger.move(server, Status.STOPPING, "drained", now=ledger.now(), by="anna")
    shown = text_of(root.get(page_of(server)))
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    story = rf"{at} draining stopping anna drained .*{at} running draining web1 1 is wanted"
    assert re.search(story, shown), shown


def test_who_may_see_servers_sees_their_story(anna: Client) -> None:
    server = make("default-1")
    assert ledger.move(server, Status.DRAINING, "1 is wanted", now=ledger.now())
    assert "running draining web1 1 is wanted" in text_of(anna.get(page_of(server)))
    for place in (TARGETS, f"{ADMIN}decision/", f"{ADMIN}provider/"):
        assert anna.get(place).status_code == 403


@pytest.mark.parametrize("model", ["server", "target", "decision", "provider"])
def test_nothing_can_be_added_changed_or_deleted_by_hand(root: Client, model: str) -> None:
    make("default-1")
    ledger.target("default")
    ledger.provider("a")
    decided("default", ledger.now(), ledger.now())
    row = {"server": Server, "target": Target, "decision": Decision, "provider": Provider}[model].objects.get()
    assert root.get(f"{ADMIN}{model}/add/").status_code == 403
    assert root.post(f"{ADMIN}{model}/{row.pk}/delete/").status_code == 403
    page = root.get(f"{ADMIN}{model}/{row.pk}/change/").content.decode()
    assert "Close" in page and 'name="_save"' not in page
    assert "delete_selected" not in root.get(f"{ADMIN}{model}/").content.decode()


def test_the_trouble_with_a_provider_is_said_before_the_servers(root: Client) -> None:
    """One that is down, slow, lying or out of quota is seen where one looks first."""
    now = ledger.now()
    ledger.provider("a")
    ledger.target("default")
    ledger.providers().update(trouble="no answer within 30 s", trouble_since=now, orphans=[{"id": "i-9", "name": ""}])
    ledger.targets().update(short_since=now, short_because="no room at a: 4 of 4 machines are there")
    shown = text_of(root.get(SERVERS))
    at = f"{now:%Y-%m-%d %H:%M:%S}Z"
    assert f"The provider a does not answer since {at}: no answer within 30 s" in shown
    assert f"Servers of the type default are missing since {at}: no room at a: 4 of 4 machines are there" in shown
    assert "Machines at a bear our tag, have no server, and are left alone: i-9" in shown


def test_a_provider_is_shown_with_its_places(root: Client) -> None:
    make("default-1"), make("default-2", Status.ERRORED), make("default-3", Status.NEW)
    ledger.provider("a")
    ledger.provider("gone")
    ledger.providers().filter(name="a").update(unknown=1, counted=3)
    shown = text_of(root.get(f"{ADMIN}provider/"))
    assert "a 3 of 4 3 1 " in shown and "gone 0 - 0 " in shown
    assert "3 of 4" in text_of(root.get(f"{ADMIN}provider/{ledger.provider('a').pk}/change/"))


def test_a_provider_that_nobody_has_looked_at_for_a_minute_is_not_shown_with_trouble(root: Client) -> None:
    ledger.provider("a")
    ledger.providers().filter(name="a").update(trouble_since=datetime(2030, 1, 2, 3, tzinfo=timezone.utc))
    assert "2030-01-02" not in text_of(root.get(f"{ADMIN}provider/"))
    assert [line.trouble_since for line in operate.provider_lines()] == [None]


def test_a_decision_is_shown_with_its_reason(root: Client) -> None:
    now = ledger.now()
    decided("default", now - HOUR, now, wanted=3, running=1, provisioned=2, asked=7, times=60, why="14 jobs wait")
    assert re.search(
        r"default [\d-]+ [\d:]+ [\d-]+ [\d:]+ 7 3 1 2 14 jobs wait web1", text_of(root.get(f"{ADMIN}decision/"))
    )


def test_a_type_is_shown_with_what_is_wanted_and_what_there_is(root: Client) -> None:
    fleet.ensure(3)
    make("default-1"), make("default-2", Status.STARTING), make("big-1", type="big"), make("default-3", Status.STOPPED)
    assert re.search(r"default 3 1 2 [\d-]+ [\d:]+ fleet\.ensure\(3\)", text_of(root.get(TARGETS)))
    assert "fleet.ensure(3)" in text_of(root.get(f"{TARGETS}{ledger.target('default').pk}/change/"))


def test_one_that_is_drained_for_a_reboot_counts_as_one_that_comes_back(root: Client) -> None:
    fleet.ensure(2)
    make("default-1"), make("default-2", Status.DRAINING, reboot_requested_at=ledger.now())
    assert re.search(r"default 2 1 2 [\d-]+ [\d:]+ fleet\.ensure\(2\)", text_of(root.get(TARGETS)))


# -- the picture ------------------------------------------------------------------------------------------------------


def pictures_in(page: Any) -> list[ElementTree.Element]:
    text = page.content.decode()
    found = re.findall(r'<svg [^>]*role="img".*?</svg>', text, re.S)
    return [ElementTree.fromstring(each) for each in found]  # noqa: S314 - our own page


def test_the_last_day_is_drawn_for_each_type_and_on_its_page(root: Client) -> None:
    now = ledger.now()
    for name, wanted in (("big", 2), ("default", 7)):
        ledger.target(name)
        decided(name, now - 12 * HOUR, now, wanted=wanted, running=1)
    titles = [picture[0].text for picture in pictures_in(root.get(TARGETS))]
    assert titles == ["big: servers wanted and running", "default: servers wanted and running"]
    [picture] = pictures_in(root.get(f"{TARGETS}{ledger.target('default').pk}/change/"))
    assert "7 were wanted and 1 were running; at last 7 and 1." in (picture[1].text or "")
    ids = [each.get("id") for image in pictures_in(root.get(TARGETS)) for each in image.iter() if each.get("id")]
    assert len(ids) == len(set(ids)) == 4


def test_what_was_decided_before_the_last_day_is_not_drawn(root: Client) -> None:
    now = ledger.now()
    ledger.target("default")
    decided("default", now - 3 * DAY, now - DAY - HOUR, wanted=9)
    [picture] = pictures_in(root.get(TARGETS))
    assert (picture[1].text or "").startswith("Nothing was decided from")


def test_our_pages_have_no_script_and_no_style_of_their_own(root: Client) -> None:
    """A content security policy that allows the admin's own files alone lets them be seen."""
    server = make("default-1")
    fleet.ensure(1)
    decided("default", ledger.now() - HOUR, ledger.now())
    for place in (SERVERS, page_of(server), TARGETS, f"{ACT['drain']}?server=default-1"):
        page = root.get(place).content.decode()
        assert not re.search(r"<script(?![^>]*\bsrc=)[^>]*>(?!\s*\{)", re.sub(r'type="application/json"', "", page)), (
            place
        )
        assert " style=" not in page and "<style" not in page and not re.search(r"\son\w+=", page), place


# -- act --------------------------------------------------------------------------------------------------------------


def act(client: Client, verb: str, *names: str) -> str:
    """Do it, and return what is said then."""
    return text_of(client.post(ACT[verb], {"server": names}, follow=True))


ENDS = {"drain": "draining", "retire": "stopping"}


@pytest.mark.parametrize("verb", ["drain", "retire"])
def test_one_is_asked_before_a_server_is_ended_and_then_it_is_and_it_is_logged(anna: Client, verb: str) -> None:
    fleet.ensure(1)
    server = make("default-1", jobs=2)
    asked = anna.get(ACT[verb], {"server": "default-1"})
    assert "default-1 : running, 2 jobs (default, a)" in text_of(asked)
    assert "others are made in their place" in text_of(asked)
    assert again(server).version == 0
    said = act(anna, verb, "default-1")
    assert "another one is made in its place, since 1 of its type are wanted as before" in said
    server = again(server)
    assert server.status == ENDS[verb]
    [transition] = transitions_of(server)
    assert (transition.by, transition.previous) == ("anna", "running")
    entry = LogEntry.objects.get()
    assert (entry.user.username, entry.object_id, entry.object_repr) == ("anna", str(server.pk), "default-1")
    assert "another one is made in its place" in entry.change_message


@pytest.mark.parametrize(("verb", "then"), [("drain", "stopped and deleted then"), ("reboot", "rebooted then")])
def test_the_page_that_asks_says_whose_work_is_broken_off(anna: Client, verb: str, then: str) -> None:
    types.register(types.ServerType("gentle").drain_with(lambda server: 1))
    make("gentle-1", type="gentle"), make("default-1")
    asked = text_of(anna.get(ACT[verb], {"server": ["gentle-1", "default-1"]}))
    assert f"end what they do (up to the limit of their type), and are {then}: gentle-1" in asked
    assert "is broken off: default-1" in asked
    only = text_of(anna.get(ACT[verb], {"server": "gentle-1"}))
    assert "end what they do" in only and "broken off" not in only
    assert "end what they do" not in text_of(anna.get(ACT[verb], {"server": "default-1"}))


def test_the_page_that_asks_knows_a_drain_where_nobody_has_read_its_schedule_yet(
    anna: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    gentle = types.ServerType("gentle").drain_with(lambda server: 1)
    monkeypatch.setattr(operate, "discover_errors", lambda: types.register(gentle))
    make("gentle-1", type="gentle")
    asked = text_of(anna.get(ACT["drain"], {"server": "gentle-1"}))
    assert "end what they do" in asked and "broken off" not in asked


def test_a_reboot_and_a_retry_are_asked_for_and_logged(anna: Client) -> None:
    running, starting = make("default-1"), make("default-2", Status.STARTING, attempts=4)
    assert "default-1: it is rebooted at the next look at a." in act(anna, "reboot", "default-1")
    assert "default-2: its next step is tried at the next look at a." in act(anna, "retry", "default-2")
    assert again(running).reboot_requested_at is not None and again(starting).attempts == 0
    assert LogEntry.objects.count() == 2


def test_several_are_asked_about_on_one_page(anna: Client) -> None:
    servers = [make(f"default-{number}") for number in range(3)]
    chosen = {"action": "drain_selected", "_selected_action": [each.pk for each in servers[:2]]}
    page = anna.post(SERVERS, chosen)
    given = re.findall(r'<input type="hidden" name="server" value="([^"]*)">', page.content.decode())
    assert sorted(given) == ["default-0", "default-1"]
    assert {again(each).status for each in servers} == {"running"}
    act(anna, "drain", *given)
    assert [again(each).status for each in servers] == ["draining", "draining", "running"]


def test_what_ends_nothing_is_done_at_once(anna: Client) -> None:
    server = make("default-1", Status.STARTING, attempts=4)
    chosen = {"action": "retry_selected", "_selected_action": [server.pk]}
    assert "default-1: its next step is tried" in text_of(anna.post(SERVERS, chosen, follow=True))
    assert again(server).attempts == 0


def test_what_cannot_be_done_is_said_and_the_rest_is_done(anna: Client) -> None:
    running, errored = make("default-1"), make("default-2", Status.ERRORED)
    said = act(anna, "drain", "default-1", "default-2")
    assert "default-2: it went wrong, and is cleaned up." in said
    assert (again(running).status, again(errored).status) == ("draining", "errored")
    assert LogEntry.objects.count() == 1


@pytest.mark.parametrize("verb", list(ACT))
def test_a_type_at_a_provider_that_is_none_keeps_nobody_from_acting_and_is_said(root: Client, verb: str) -> None:
    types.register(types.ServerType("encoder").provider("aa"))
    make("default-1", Status.STARTING if verb == "retry" else Status.RUNNING)
    assert "default-1" in text_of(root.get(ACT[verb], {"server": "default-1"}))
    said = act(root, verb, "default-1")
    assert "default-1: " in said and "Not done" not in said
    assert again(Server.objects.get()).version == 1
    said = unescape(text_of(root.get(SERVERS)))
    assert "The server type 'encoder' is to be made at 'aa', which is no provider. Did you mean 'a'?" in said


@pytest.mark.parametrize("verb", list(ACT))
def test_settings_that_are_wrong_are_said_and_nothing_is_done(
    root: Client, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make("default-1", Status.STARTING if verb == "retry" else Status.RUNNING)

    def wrong() -> Any:
        raise FleetError("MULTISERVER_SCHEDULE_SERVERS has no option 'POL'.")

    monkeypatch.setattr(conf, "load", wrong)
    page = root.post(ACT[verb], {"server": "default-1"})
    assert page.status_code == 302
    [said] = get_messages(page.wsgi_request)
    assert str(said) == "Not done: MULTISERVER_SCHEDULE_SERVERS has no option 'POL'."
    assert again(server).version == 0


def test_a_name_that_is_gone_is_said_to_be(anna: Client) -> None:
    assert "Not done: No server is named 'default-9'" in act(anna, "drain", "default-9")
    assert "Not done: No server was chosen." in act(anna, "drain")
    assert "There is no such server." in text_of(anna.get(ACT["drain"], {"server": "default-9"}))


@pytest.mark.parametrize(
    ("status", "offered"),
    [
        (Status.RUNNING, {"drain", "reboot", "retire"}),
        (Status.STARTING, {"reboot", "retire", "retry"}),
        (Status.ERRORED, {"retire", "retry"}),
        (Status.STOPPED, {"retry"}),
        (Status.DELETED, set()),
    ],
)
def test_its_page_offers_what_makes_sense(anna: Client, status: Status, offered: set[str]) -> None:
    server = make("default-1", status)
    page = anna.get(page_of(server)).content.decode()
    assert {verb for verb, place in ACT.items() if f'href="{place}?server=default-1"' in page} == offered


@pytest.mark.parametrize("verb", list(ACT))
def test_each_deed_has_a_permission_of_its_own(verb: str) -> None:
    server = make("default-1", Status.STARTING)
    others = [f"{each}_server" for each in ACT if each != verb]
    client = browser_of("view_server", *others)
    assert client.get(ACT[verb], {"server": "default-1"}).status_code == 403
    assert client.post(ACT[verb], {"server": "default-1"}).status_code == 403
    assert f"{verb}_selected" not in client.get(SERVERS).content.decode()
    assert f'href="{ACT[verb]}' not in client.get(page_of(server)).content.decode()
    assert again(server).version == 0
    user = User.objects.get(username="anna")
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_server", f"{verb}_server"]))
    assert client.get(ACT[verb], {"server": "default-1"}).status_code == 200
    assert f"{verb}_selected" in client.get(SERVERS).content.decode()


@pytest.mark.parametrize("permissions", [[], ["view_target"], ["drain_server", "retire_server"]])
def test_who_may_not_see_servers_cannot_do_anything_to_them(permissions: list[str]) -> None:
    server = make("default-1")
    client = browser_of(*permissions)
    assert client.get(SERVERS).status_code == 403
    for place in ACT.values():
        assert client.post(place, {"server": "default-1"}).status_code == 403
    assert again(server).version == 0


def test_looking_and_forging_do_nothing() -> None:
    server = make("default-1")
    client = browser_of("view_server", "retire_server", enforce_csrf_checks=True)
    for method in (client.get, client.head):
        method(f"{ACT['retire']}?server=default-1")
    assert client.post(ACT["retire"], {"server": "default-1"}).status_code == 403
    assert again(server).version == 0
    assert Client().post(ACT["retire"], {"server": "default-1"})["Location"].startswith("/admin/login/")


@pytest.mark.django_db(transaction=True)
def test_it_works_where_each_request_is_a_transaction(anna: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
    server = make("default-1")
    assert "what it does is broken off" in act(anna, "drain", "default-1")
    assert again(server).status == "draining"


def test_what_others_wrote_is_shown_escaped(root: Client) -> None:
    evil = "<script>alert(1)</script>"
    server = make("default-1", Status.ERRORED, error=evil, why=evil, reason=evil, address=evil)
    ledger.provider("a")
    ledger.providers().update(trouble=evil)
    ledger.target(evil)
    decided(evil, ledger.now(), ledger.now(), why=evil)
    places = (
        SERVERS,
        page_of(server),
        TARGETS,
        f"{ADMIN}decision/",
        f"{ADMIN}provider/",
        f"{ACT['retire']}?server=default-1",
    )
    for place in places:
        page = root.get(place).content.decode()
        assert "<script>alert" not in page, place
        assert evil in unescape(page) or place.startswith(ACT["retire"]), place


def test_no_page_shows_a_secret(root: Client) -> None:
    server = make("default-1", Status.ERRORED, configuration={"size": 4, "token": types.option("TOKEN")})
    fleet.ensure(1)
    ledger.provider("a")
    decided("default", ledger.now(), ledger.now())
    places = [f"{ADMIN}{model}/" for model in ("server", "target", "decision", "provider")]
    places += [page_of(server), f"{ADMIN}provider/{ledger.provider('a').pk}/change/"]
    for place in places:
        page = unescape(root.get(place).content.decode())
        assert SECRET not in page, place
    assert '"$option": "TOKEN"' in unescape(root.get(page_of(server)).content.decode())
