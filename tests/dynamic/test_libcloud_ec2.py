"""``LibcloudProvider`` at EC2: over HTTP, against moto's server, through a proxy that spoils answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest

from multiserver_schedule.servers.entries import MachineState, ServerInfo
from multiserver_schedule.servers.exceptions import (
    ProviderBusy,
    ProviderError,
    ProviderFull,
    ProviderRefused,
    UnknownState,
)
from multiserver_schedule.testing.providers import ProviderContract

from .needs import needs
from .standin import HOST, Answer, Fault, Proxy, Request

needs("libcloud")
from urllib3.exceptions import MaxRetryError, ProtocolError, SSLError  # noqa: E402

from multiserver_schedule.servers.providers.libcloud import LibcloudProvider  # noqa: E402
from multiserver_schedule.servers.providers.libcloud.errors import translate  # noqa: E402

# libcloud signs with it, on Python 3.12 and later.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDXMODj8Lfum8jgpBi7lV3MnprKKIjuQKCvw7bjERMfz me@shop"
CONFIGURATION = {"size": "t3.micro", "image": "ami-12c6146b"}
BODY = '<?xml version="1.0"?><Response><Errors><Error><Code>{}</Code><Message>{}</Message></Error></Errors></Response>'


Make = Callable[..., LibcloudProvider]


@pytest.fixture
def make_provider(proxy: Proxy) -> Make:
    def make(fleet: str = "shop", **options: Any) -> LibcloudProvider:
        arguments = {"key": "AKIAIOSFODNN7EXAMPLE", "secret": SECRET, "region": "eu-west-1"}
        arguments |= {"host": HOST, "port": proxy.port, "secure": False, **options.pop("arguments", {})}
        return LibcloudProvider("aws", {"driver": "ec2", "arguments": arguments, **options}, fleet=fleet)

    return make


@pytest.fixture
def provider(make_provider: Make) -> LibcloudProvider:
    return make_provider()


def server(key: str = "3f9a0c11d2e4", **configuration: Any) -> ServerInfo:
    return ServerInfo(f"big-{key}", key, "big", "aws", configuration={**CONFIGURATION, **configuration})


def action(name: str, answer: Callable[[Callable[[], Answer]], Answer], *, times: int = 10**6) -> Fault:
    """Spoil this action of EC2's, so many times."""
    left = [times]

    def fault(request: Request, passed_on: Callable[[], Answer]) -> Answer | None:
        if request.query.get("Action") != name or not left[0]:
            return None
        left[0] -= 1
        return answer(passed_on)

    return fault


def refusing(status: int, code: str, message: str = "No.", **headers: str) -> Callable[[Callable[[], Answer]], Answer]:
    return lambda passed_on: Answer(status, BODY.format(code, message).encode(), headers)


def lost(passed_on: Callable[[], Answer]) -> Answer:
    """Have it done, and say nothing."""
    passed_on()
    return Answer(cut=-1)


def half(passed_on: Callable[[], Answer]) -> Answer:
    whole = passed_on()
    whole.cut = len(whole.body) // 2
    return whole


def asked(proxy: Proxy, name: str) -> list[Request]:
    return [request for request in proxy.requests if request.query.get("Action") == name]


class TestContract(ProviderContract):
    @pytest.fixture
    def make_provider(self, make_provider: Make) -> Make:
        return make_provider

    @pytest.fixture
    def configuration(self) -> Mapping[str, Any]:
        return CONFIGURATION


def test_the_tags_and_the_key_are_in_the_request_that_creates_the_machine(
    provider: LibcloudProvider, proxy: Proxy
) -> None:
    provider.create_server(server(ex_metadata={"team": "data"}))
    (request,) = asked(proxy, "RunInstances")
    sent = {
        request.query[f"TagSpecification.1.Tag.{n}.Key"]: request.query[f"TagSpecification.1.Tag.{n}.Value"]
        for n in range(1, 6)
    }
    assert sent == {
        "Name": "big-3f9a0c11d2e4",
        "team": "data",
        "multiserver_schedule_fleet": "shop",
        "multiserver_schedule_key": "3f9a0c11d2e4",
        "multiserver_schedule_type": "big",
    }
    assert request.query["ClientToken"] == "3f9a0c11d2e4"
    assert (request.query["MinCount"], request.query["MaxCount"]) == ("1", "1")
    # No second call sets them: a process that dies between the two would leave a machine that nobody finds.
    assert asked(proxy, "CreateTags") == []


@pytest.mark.parametrize("how", [lost, half], ids=["no answer", "half an answer"])
def test_a_machine_whose_creation_was_answered_to_nobody_is_found_by_its_key_and_is_one(
    make_provider: Make, proxy: Proxy, how: Any
) -> None:
    proxy.faults.append(action("RunInstances", how, times=1))
    with pytest.raises(ProviderError) as caught:
        make_provider().create_server(server())
    # Nothing certain was said: neither that it was refused, nor that nothing was done.
    assert type(caught.value) is ProviderError
    # Another process looks.
    (found,) = make_provider().find_by_tag("3f9a0c11d2e4")
    assert make_provider().list_servers() == [found]
    assert len(asked(proxy, "RunInstances")) == 1


def test_a_retry_that_an_environment_variable_asks_libcloud_for_makes_no_second_machine(
    provider: LibcloudProvider, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBCLOUD_RETRY_FAILED_HTTP_REQUESTS", "1")
    proxy.faults.append(action("RunInstances", lost, times=1))
    with pytest.raises(ProviderError):
        provider.create_server(server())
    assert provider.current_server_count() == 1


def test_asking_amazon_twice_with_a_key_makes_one_machine_and_an_unknown_address_is_not_believed_to(
    make_provider: Make,
) -> None:
    def idempotent(**arguments: Any) -> bool:
        options = {"driver": "ec2", "arguments": {"key": "a", "secret": "b", **arguments}}
        return LibcloudProvider("aws", options, fleet="shop").idempotent

    assert idempotent()
    assert idempotent(host="ec2.eu-west-1.amazonaws.com")
    assert not idempotent(host="amazonaws.com.example.org")
    # moto's server takes the token, and makes two.
    provider = make_provider()
    assert not provider.idempotent
    assert make_provider(idempotent=True).idempotent
    assert provider.create_server(server()).id != provider.create_server(server()).id
    assert len(provider.find_by_tag("3f9a0c11d2e4")) == 2


def test_the_request_that_is_made_again_with_a_key_is_the_same_so_that_amazon_knows_it_by_its_token(
    make_provider: Make, proxy: Proxy
) -> None:
    made: dict[str, tuple[Mapping[str, str], Answer]] = {}

    def as_documented(request: Request, passed_on: Callable[[], Answer]) -> Answer | None:
        """Amazon repeats its answer to a token, and refuses the token with other parameters; moto's server does not."""
        if request.query.get("Action") != "RunInstances":
            return None
        token = request.query["ClientToken"]
        if token not in made:
            made[token] = (request.query, passed_on())
            return Answer(cut=-1)
        query, answer = made[token]
        return answer if query == request.query else refusing(400, "IdempotentParameterMismatch")(passed_on)

    proxy.faults.append(as_documented)
    with pytest.raises(ProviderError):
        make_provider(idempotent=True).create_server(server())
    machine = make_provider(idempotent=True).create_server(server())
    assert [each.id for each in make_provider().list_servers()] == [machine.id]


def test_a_key_that_was_used_with_other_values_may_have_a_machine(provider: LibcloudProvider, proxy: Proxy) -> None:
    proxy.faults.append(action("RunInstances", refusing(400, "IdempotentParameterMismatch")))
    with pytest.raises(ProviderError) as caught:
        provider.create_server(server())
    assert type(caught.value) is ProviderError


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "RequestLimitExceeded", ProviderBusy),
        (400, "Throttling", ProviderBusy),
        (400, "RequestExpired", ProviderBusy),
        (400, "InstanceLimitExceeded", ProviderFull),
        (400, "VcpuLimitExceeded", ProviderFull),
        (500, "InsufficientInstanceCapacity", ProviderFull),
        (400, "InsufficientFreeAddressesInSubnet", ProviderFull),
        (400, "MaxSpotInstanceCountExceeded", ProviderFull),
        (401, "AuthFailure", ProviderRefused),
        (403, "UnauthorizedOperation", ProviderRefused),
        (400, "InvalidAMIID.NotFound", ProviderRefused),
        (400, "InvalidParameterValue", ProviderRefused),
        (500, "InternalError", ProviderError),
        (503, "Unavailable", ProviderError),
    ],
)
def test_an_error_of_amazons_says_what_was_done(
    provider: LibcloudProvider, proxy: Proxy, status: int, code: str, kind: type[ProviderError]
) -> None:
    proxy.faults.append(action("RunInstances", refusing(status, code, "Because.")))
    with pytest.raises(ProviderError, match=code) as caught:
        provider.create_server(server())
    assert type(caught.value) is kind
    assert "aws: cannot create big-3f9a0c11d2e4" in str(caught.value)


# libcloud uses what it has itself given up.
@pytest.mark.filterwarnings("ignore:This method has been deprecated:UserWarning")
def test_an_error_of_amazons_says_what_was_done_after_other_questions_too(
    provider: LibcloudProvider, proxy: Proxy
) -> None:
    proxy.faults.append(action("RunInstances", refusing(500, "InsufficientInstanceCapacity")))
    with pytest.raises(ProviderFull):
        provider.create_server(server(ssh_key=PUBLIC_KEY))
    assert len(asked(proxy, "DescribeKeyPairs")) == 1


def test_a_provider_that_says_when_to_come_back_is_heard(provider: LibcloudProvider, proxy: Proxy) -> None:
    proxy.faults.append(action("RunInstances", refusing(429, "Throttling", **{"retry-after": "17"})))
    with pytest.raises(ProviderBusy) as caught:
        provider.create_server(server())
    assert caught.value.retry_after == timedelta(seconds=17)


GARBAGE = {
    "not authorized": refusing(401, "AuthFailure"),
    "forbidden": refusing(403, "UnauthorizedOperation"),
    "an error of its own": refusing(500, "InternalError"),
    "a proxy's page": lambda _: Answer(200, b"<html><body>Welcome</body></html>"),
    "a proxy's 404": lambda _: Answer(404, b"<html><body>Not found</body></html>"),
    "another 404": refusing(404, "NoSuchBucket"),
    "another service": lambda _: Answer(200, b'<ListAllMyBucketsResult xmlns="http://s3.amazonaws.com/doc/"/>'),
    "nothing": lambda _: Answer(200, b""),
    "half of it": half,
    "no answer": lost,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_no_machine_is_taken_for_gone_stopped_or_never_made_because_of_an_error(
    provider: LibcloudProvider, proxy: Proxy, garbage: Any
) -> None:
    machine = provider.create_server(server())
    proxy.faults.append(action("DescribeInstances", garbage))
    for look in (provider.has_been_deleted, provider.has_stopped, provider.has_started):
        with pytest.raises(ProviderError):
            look(machine.id)
    for ask in (provider.list_servers, provider.current_server_count, lambda: provider.find_by_tag(machine.key)):
        with pytest.raises(ProviderError):
            ask()
    with pytest.raises(ProviderError):
        provider.delete_server(machine.id)
    proxy.faults.clear()
    assert [each.id for each in provider.list_servers()] == [machine.id]


def test_a_list_is_read_to_its_last_page(provider: LibcloudProvider, proxy: Proxy) -> None:
    made = {provider.create_server(server(f"3f9a0c11d2e{n}")).id for n in range(5)}

    def two_at_a_time(request: Request, passed_on: Callable[[], Answer]) -> Answer | None:
        if "MaxResults" not in request.query:
            return None
        return proxy.passed_on(
            Request(**{**vars(request), "target": request.target.replace("MaxResults=1000", "MaxResults=2")})
        )

    proxy.faults.append(two_at_a_time)
    assert {machine.id for machine in provider.list_servers()} == made
    assert provider.current_server_count() == 5
    assert len(asked(proxy, "DescribeInstances")) == 6
    # The second page fails: no list, rather than a short one.
    proxy.faults.insert(
        0, lambda request, _: refusing(500, "InternalError")(_) if "NextToken" in request.query else None
    )
    with pytest.raises(ProviderError):
        provider.list_servers()


def test_a_machine_is_ours_by_its_whole_fleet_and_its_whole_key(make_provider: Make) -> None:
    make_provider("shop-staging").create_server(server("aaaaaaaaaaaa"))
    make_provider("shop").create_server(server("bbbbbbbbbbbb2"))
    shop = make_provider("shop")
    assert [machine.key for machine in shop.list_servers()] == ["bbbbbbbbbbbb2"]
    assert shop.find_by_tag("bbbbbbbbbbbb") == []
    assert shop.find_by_tag("aaaaaaaaaaaa") == []
    assert shop.current_server_count() == 1
    assert make_provider("shop", count_all=True).current_server_count() == 2


def test_nothing_is_done_to_a_machine_of_somebody_elses(make_provider: Make, proxy: Proxy) -> None:
    theirs = make_provider("other").create_server(server())
    for call in (make_provider().stop_server, make_provider().delete_server, make_provider().reboot_server):
        with pytest.raises(ProviderRefused, match="does not bear the tag of the fleet 'shop'"):
            call(theirs.id)
    for name in ("StopInstances", "TerminateInstances", "RebootInstances"):
        assert asked(proxy, name) == []


def test_a_terminated_machine_that_amazon_still_shows_is_gone(provider: LibcloudProvider, proxy: Proxy) -> None:
    machine = provider.create_server(server())
    provider.delete_server(machine.id)
    shown = proxy.passed_on(asked(proxy, "DescribeInstances")[0])
    assert b"terminated" in shown.body
    assert provider.has_been_deleted(machine.id)
    assert provider.list_servers() == []
    assert provider.find_by_tag(machine.key) == []
    assert provider.current_server_count() == 0


@pytest.mark.parametrize(
    ("word", "state"),
    [("shutting-down", MachineState.DELETING), ("stopping", MachineState.STOPPING), ("melting", MachineState.UNKNOWN)],
)
def test_the_words_for_states_are_amazons_own(
    provider: LibcloudProvider, proxy: Proxy, word: str, state: MachineState
) -> None:
    machine = provider.create_server(server())

    def said(passed_on: Callable[[], Answer]) -> Answer:
        answer = passed_on()
        answer.body = answer.body.replace(b"<name>running</name>", f"<name>{word}</name>".encode())
        return answer

    proxy.faults.append(action("DescribeInstances", said))
    (listed,) = provider.list_servers()
    assert (listed.state, listed.word) == (state, word)
    assert not provider.has_been_deleted(machine.id)
    if state is MachineState.UNKNOWN:
        for ask in (provider.has_started, provider.has_stopped):
            with pytest.raises(UnknownState, match="'melting'"):
                ask(machine.id)
    else:
        assert not provider.has_started(machine.id)
        assert not provider.has_stopped(machine.id)


def test_a_slow_provider_is_waited_for_no_longer_than_its_timeout(make_provider: Make, proxy: Proxy) -> None:
    def slow(passed_on: Callable[[], Answer]) -> Answer:
        time.sleep(4)
        return passed_on()

    proxy.faults.append(action("RunInstances", slow))
    began = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        make_provider(timeout=0.2).create_server(server())
    assert time.monotonic() - began < 3.5
    assert type(caught.value) is ProviderError
    # It was made all the same, later.
    until = time.monotonic() + 10
    while not (found := make_provider().find_by_tag("3f9a0c11d2e4")) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(found) == 1


def test_an_answer_that_drips_in_is_given_up_at_the_timeout(make_provider: Make, proxy: Proxy) -> None:
    def dripping(passed_on: Callable[[], Answer]) -> Answer:
        answer = passed_on()
        answer.drip = 0.05
        return answer

    proxy.faults.append(action("DescribeInstances", dripping))
    began = time.monotonic()
    with pytest.raises(ProviderError, match="not whole within"):
        make_provider(timeout=0.4).list_servers()
    assert time.monotonic() - began < 5


def test_a_provider_that_accepts_no_connection_certainly_did_nothing(make_provider: Make, proxy: Proxy) -> None:
    proxy.close()
    with pytest.raises(ProviderBusy, match=r"no connection: .*refused") as caught:
        make_provider().create_server(server(ex_userdata="BROKER=hunter2hunter2"))
    # requests' own text has the URL, which has the user data and a signature.
    assert "Action=" not in str(caught.value)
    with pytest.raises(ProviderBusy, match="no connection"):
        make_provider(arguments={"host": "no-such-host.invalid"}).create_server(server())


@pytest.mark.parametrize(
    "how", [lost, half, refusing(400, "InvalidParameterValue", f"bad {SECRET} and hunter2hunter2")]
)
def test_no_secret_is_in_an_error(make_provider: Make, proxy: Proxy, how: Any) -> None:
    provider = make_provider(BROKER="amqp://u:hunter2hunter2@broker")
    proxy.faults.append(action("RunInstances", how))
    info = server(ex_userdata="BROKER=hunter2hunter2", ex_metadata={"broker": "amqp://u:hunter2hunter2@broker"})
    with pytest.raises(ProviderError) as caught:
        provider.create_server(info)
    for hidden in (SECRET, "amqp://u:hunter2hunter2@broker", "AKIAIOSFODNN7EXAMPLE", "Signature=", "BROKER="):
        assert hidden not in str(caught.value)
    # Whoever prints the traceback sees no more.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "reason", [SSLError("bad record"), ProtocolError("Connection aborted.", OSError(104, "Reset"))]
)
def test_the_url_of_a_request_is_in_no_error_wherever_it_failed(reason: Exception) -> None:
    wrapped = OSError(MaxRetryError(None, "/?Action=RunInstances&UserData=aHVudGVyMg&Signature=abc", reason))  # type: ignore[arg-type]
    found = translate(wrapped, str, is_not_there=lambda code, text: False)
    assert type(found) is ProviderError
    assert "Action=" not in str(found)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ex_mincount": 3}, "'ex_mincount', which is not for it to say"),
        ({"ex_maxcount": 3}, "'ex_maxcount', which is not for it to say"),
        ({"ex_clienttoken": "mine"}, "'ex_clienttoken', which is not for it to say"),
        ({"ex_user_data": "x"}, "Did you mean 'ex_userdata'"),
        ({"image": None}, None),
    ],
)
def test_a_configuration_that_would_make_something_else_is_refused_before_anything_is_asked(
    provider: LibcloudProvider, proxy: Proxy, given: Mapping[str, Any], told: str | None
) -> None:
    if told is None:
        info = ServerInfo("big-1", "1", "big", "aws", configuration={"size": "t3.micro"})
        given, told = {}, "has no 'image', which the driver needs"
    else:
        info = server(**given)
    with pytest.raises(ProviderRefused, match=told):
        provider.create_server(info)
    assert proxy.requests == []


def test_what_the_options_say_of_the_configuration_holds_unless_the_type_says_otherwise(
    make_provider: Make, proxy: Proxy
) -> None:
    provider = make_provider(configuration={"size": "t3.large", "image": "ami-0", "location": "eu-west-1b"})
    provider.create_server(server())
    (request,) = asked(proxy, "RunInstances")
    assert (request.query["InstanceType"], request.query["ImageId"]) == ("t3.micro", "ami-12c6146b")
    assert request.query["Placement.AvailabilityZone"] == "eu-west-1b"
