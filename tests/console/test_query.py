"""What is typed into fields and the search line."""

from __future__ import annotations

import datetime
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hookd.console.query import path_to, read, words
from hookd.postgres.search import ATTEMPT_FILTERS, DELIVERY_FILTERS, BadFilter, Filter

NOW = datetime.datetime(2026, 11, 25, 12, 0, tzinfo=datetime.UTC)

ID = "01a2105c-bc97-781b-8fe7-2cb4ac3aca3d"


def test_fields_of_a_url() -> None:
    given = {
        "type": " user.* ", "tenant": "acme", "state": "exhausted, expired", "endpoint": ID, "since": "2h",
        "until": "2026-11-25 11:30", "path": "$.id ? (@ == 1)", "nonsense": "x", "event": "", "cursor": "abc",
    }  # fmt: skip
    query = read("/deliveries", given, DELIVERY_FILTERS, NOW)
    assert query.filter == Filter(
        type="user.*", tenant="acme", states=("exhausted", "expired"), endpoint=UUID(ID), path="$.id ? (@ == 1)",
        since=NOW - datetime.timedelta(hours=2), until=NOW - datetime.timedelta(minutes=30),
    )  # fmt: skip
    assert query.cursor == "abc"
    assert "nonsense" not in query.typed
    again = dict(p.split("=") for p in query.url(None).partition("?")[2].split("&"))
    assert "cursor" not in again
    assert again["type"] == "user.%2A"


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [("endpoint", "x", "no id"), ("since", "yesterday", "2h or 7d"), ("status", "5xx!", "no number"), ("delivery", "-1", "no number"),
     ("until", "9" * 30 + "d", "no time")],
)  # fmt: skip
def test_a_field_that_cannot_be_read_is_named(field: str, text: str, said: str) -> None:
    with pytest.raises(BadFilter, match=said) as raised:
        read("/live", {field: text}, ATTEMPT_FILTERS, NOW)
    assert str(raised.value).startswith(field)


def test_the_search_line() -> None:
    assert words('state:exhausted tenant:"acme inc" user.*') == {
        "state": "exhausted",
        "tenant": "acme inc",
        "type": "user.*",
    }
    assert words("exhausted") == {"state": "exhausted"}
    assert words("data.id:123") == {"path": '$."id" ? (@ == 123)'}
    assert words("data.user.name:Jo") == {"path": '$."user"."name" ? (@ == "Jo")'}
    with pytest.raises(BadFilter, match="nothing to search by"):
        words("colour:red")


@pytest.mark.parametrize("line", ['data.name:"John Smith', 'type:"order', 'type:"\\q"', 'type:"\\ud800"'])
def test_quotes_that_do_not_end_are_said(line: str) -> None:
    with pytest.raises(BadFilter, match="no text between quotes"):
        words(line)


def test_a_value_of_brackets_is_a_text() -> None:
    assert words("data.a:" + 100_000 * "[")["path"].endswith('[")')


@example("", "0\n")
@given(st.text(max_size=40), st.text(max_size=40))
def test_a_path_is_one_comparison_whatever_is_typed(keys: str, value: str) -> None:
    path = path_to(keys, value)
    assert path.startswith("$")
    assert path.endswith(")")
    assert "\n" not in path


@given(st.text(max_size=80))
def test_no_line_breaks_the_search(line: str) -> None:
    try:
        found = words(line)
    except BadFilter:
        return
    assert all(isinstance(v, str) for v in found.values())
