"""What must not be said is hidden in whatever text it turns up, and other text is left as it is."""

from __future__ import annotations

import pytest

from multiserver_schedule.servers import hiding


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


@pytest.mark.parametrize("text", ["https://$TOKEN@host/", "https://u:$TOKEN@host/", "amqp://{name}:{key}@host/"])
def test_what_stands_for_a_password_is_none(text: str) -> None:
    assert not hiding.has_password(text)
