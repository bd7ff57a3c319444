"""What must not be said is hidden in whatever text it turns up, and other text is left as it is."""

from __future__ import annotations

from typing import Any

import pytest

from multiserver_schedule.servers import fleet, hiding, ledger
from multiserver_schedule.servers.entries import Load, ServerInfo
from multiserver_schedule.servers.exceptions import ProviderRefused
from multiserver_schedule.servers.types import ServerType

from .cloud import FolderProvider
from .conftest import Site


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:Tr0ub4dor@host/0", "redis://:…@host/0"),
        ("redis://:Tr0ub4dor/3xyz@host/0", "redis://:…@host/0"),
        ("redis://:Tr0ub4dor#3xyz@host/0", "redis://:…@host/0"),
        ("redis://:123/3xyz@host/0", "redis://:…@host/0"),
        ("redis://:Tr0ub4dor 3xyz@host/0", "redis://:…@host/0"),
        ("amqp://me:Tr0ub@4dor@host//", "amqp://me:…@host//"),
        ("amqp://me:Tr0ub/4@dor@host//", "amqp://me:…@host//"),
        ("https://Tr0ub4dor@host/x", "https://…@host/x"),
        ("https://Tr0ub4dor:@host/x", "https://…@host/x"),
        ("ssh://me:Tr0ub4dor@host/x", "ssh://me:…@host/x"),
        ("https://a.example/?next=https://me:Tr0ub4dor@host", "https://a.example/?next=https://me:…@host"),
    ],
)
@pytest.mark.parametrize("around", ["{}", "cannot reach '{}': refused", 'see "https://a.example" and {}, or a@b'])
def test_all_of_a_password_in_a_url_is_hidden(url: str, shown: str, around: str) -> None:
    assert hiding.without(around.format(url)) == around.format(shown)
    assert hiding.has_password(around.format(url))


@pytest.mark.parametrize(
    "text",
    [
        "see https://docs.example.com/a@b",
        "see https://docs.example.com:8443/a@b, or http://localhost:8000/@me, or http://[::1]:8000/@me",
        "https://docs.example.com?to=me@example.com",
        "https://docs.example.com, or write to me@example.com",
        "https://host/a:b@c",
        "file:///srv/a@b",
        "git clone ssh://git@github.com/shop.git, or ssh://deploy@10.0.0.2/shop.git, or https://git@example.com/shop",
    ],
)
def test_an_address_without_a_password_is_left_as_it_is(text: str) -> None:
    assert hiding.without(text) == text
    assert not hiding.has_password(text)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "password",
            "PGPASSWORD",
            "db_passwd",
            "passphrase",
            "PassWord",
            "RABBITMQ_DEFAULT_PASS",
            "dbpass",
            "password2",
        ),
        *("MYSQL_PWD", "DB_PWD", "pwd", "userPwd", "secret", "AWS_SECRET_ACCESS_KEY", "clientSecret", "clientsecret"),
        *("token", "API_TOKEN", "api-tokens", "authtoken", "key", "api_key", "apiKey", "APIKEY", "private_key"),
        *("ssh_private_key", "STRIPE_KEY", "credential", "googleCredentials", "auth", "REDISCLI_AUTH", "SENTRY_DSN"),
        "Authorization",
    ],
)
def test_a_name_with_a_word_for_a_secret_is_that_of_a_secret(name: str) -> None:
    assert hiding.is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("TOKENIZERS_PARALLELISM", "author", "AUTHORS", "authorized_networks", "authority", "ssh_key", "public_key"),
        *("sshPublicKey", "sort-key", "monkey", "key_name", "compass", "bypass", "secretary", "auth_url", "", "5", 5),
        *("PASSWORD_FILE", "size", "keyboard"),
    ],
)
def test_a_name_that_only_looks_like_that_of_a_secret_is_none(name: object) -> None:
    assert not hiding.is_secret(name)


@pytest.mark.parametrize("text", ["https://$TOKEN@host/", "https://u:$TOKEN@host/", "amqp://{name}:{key}@host/"])
def test_what_stands_for_a_password_is_none(text: str) -> None:
    assert not hiding.has_password(text)


def test_a_text_is_one_that_every_database_keeps() -> None:
    error = OSError("no such file: \udcff, or \ud83d, or \0")
    assert hiding.told(error) == "OSError: no such file: �, or �, or �"
    assert hiding.traced(error).endswith("OSError: no such file: �, or �, or �\n")


def test_a_text_that_is_too_long_to_be_read_is_cut_when_its_secrets_are_hidden() -> None:
    text = hiding.told(ValueError(f"{'x' * 1985}hunter2-hunter2{'y' * 3_000_000}"), {"password": "hunter2-hunter2"})
    assert len(text) == hiding.MOST == 2000
    assert text.endswith("x…y…")
    assert len(hiding.traced(ValueError("x" * 5000))) > 5000


def test_an_error_of_a_text_that_no_database_keeps_does_not_stop_the_fleet(site: Site) -> None:
    def broken() -> Load:
        raise ValueError(f"\udcff \0 {'x' * 3_000_000}")

    fleet.register_server_type(ServerType("big").scale_on(broken, waiting_per_server=1))
    fleet.register_server_type(ServerType("small").between(1, 2))
    site.monitor()
    decision = ledger.last_decision("big")
    assert decision is not None and "ValueError: � � xxx" in decision.why
    assert len(decision.why) < 2100
    assert [server.type for server in site.servers()] == ["small"]


def test_what_a_provider_answers_in_no_text_is_kept_with_its_server(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FolderProvider, server: ServerInfo) -> Any:
        raise ProviderRefused(f"\udcff \0 {'x' * 3_000_000}")

    monkeypatch.setattr(FolderProvider, "create_server", refuse)
    fleet.ensure(1)
    site.passes(1)
    [server] = site.servers()
    assert server.error.startswith("� � xxx")
    assert len(server.error) == hiding.MOST
