"""Sessions, and who may do what with one: by the head of a request alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookd.admin.access import FORM, Access
from hookd.admin.sessions import LIFETIME_S, Sessions

TOKEN = b"0123456789abcdef0123456789abcdef"

HOST = {"Host": "127.0.0.1:8440"}
OWN = HOST | {"Origin": "http://127.0.0.1:8440", "Sec-Fetch-Site": "same-origin"}


class Wall:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_from_log_in_to_log_out() -> None:
    wall = Wall()
    sessions = Sessions(wall)
    value = sessions.open()
    cookie = f'other="odd {{"x": 1}}"; hookd={value}; theme=dark'
    assert sessions.holds(cookie)
    assert sessions.name(cookie).startswith("session ")
    assert value.split(".")[2] not in sessions.name(cookie)
    assert not Sessions(wall).holds(cookie), "another process has another key"
    wall.now += LIFETIME_S - 1
    assert sessions.holds(cookie)
    wall.now += 2
    assert not sessions.holds(cookie), "it expires"
    wall.now -= 10
    sessions.close(cookie)
    assert not sessions.holds(cookie), "a copy of the cookie is worth nothing after log-out"
    assert sessions.holds(f"hookd={sessions.open()}"), "another session goes on"


@given(st.text(max_size=200))
def test_no_cookie_that_was_made_up_opens_anything(made_up: str) -> None:
    sessions = Sessions(Wall())
    value = sessions.open()
    assert not sessions.holds(made_up)
    assert not sessions.holds(f"hookd={made_up}")
    longer = made_up.replace(";", "").strip() or "x"  # what comes after one is another cookie
    assert not sessions.holds(f"hookd={value}{longer}")
    expires, session_id, signature = value.split(".")
    for forged in (
        f"{int(expires) + 1}.{session_id}.{signature}",
        f"{expires}.{session_id}x.{signature}",
        f"{expires}.{session_id}.",
    ):
        assert not sessions.holds(f"hookd={forged}")


def refused(access: Access, method: str, path: str, headers: dict[str, str], *, form: bool = False) -> str:
    found = access.refusal(method, path, headers, has_body=form, content_type=FORM if form else "")
    return found.code if found is not None else ""


def test_what_a_session_may() -> None:
    sessions = Sessions(Wall())
    access = Access("127.0.0.1", TOKEN, sessions)
    cookie = {"Cookie": f"hookd={sessions.open()}"}
    for path in ("/", "/deliveries", "/api/v1/endpoints", "/metrics"):
        assert refused(access, "GET", path, HOST) == "token"
        assert refused(access, "GET", path, HOST | cookie) == ""
    for path in ("/login", "/console.css", "/console.js", "/icon.svg"):
        assert refused(access, "GET", path, HOST) == ""
    assert refused(access, "POST", "/endpoints/x/pause", OWN | cookie, form=True) == ""
    assert refused(access, "DELETE", "/api/v1/endpoints/x", OWN | cookie) == ""
    # what does not say where it comes from, a browser did not send
    assert refused(access, "POST", "/endpoints/x/pause", HOST | cookie, form=True) == "cross_site"
    assert refused(access, "DELETE", "/api/v1/endpoints/x", HOST | cookie) == "token"
    assert refused(access, "POST", "/login", OWN, form=True) == ""
    assert refused(access, "POST", "/login", HOST, form=True) == "cross_site"
    assert refused(access, "POST", "/endpoints/x/pause", OWN, form=True) == "token"


@pytest.mark.parametrize("token", [b"", TOKEN])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9999"}, {"Origin": "http://localhost:8440"},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:8440"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, {},
    ],
)  # fmt: skip
def test_no_form_of_another_site_is_taken(token: bytes, headers: dict[str, str]) -> None:
    sessions = Sessions(Wall())
    access = Access("127.0.0.1", token, sessions)
    cookie = {"Cookie": f"hookd={sessions.open()}"}
    for path in ("/login", "/logout", "/resend", "/endpoints/add", "/endpoints/x/remove"):
        assert refused(access, "POST", path, HOST | cookie | headers, form=True) == "cross_site"
    assert refused(access, "POST", "/api/v1/endpoints", HOST | cookie | headers, form=True) in (
        "cross_site",
        "content_type",
    )


def test_a_link_on_another_site_leads_to_a_page_and_to_nothing_else() -> None:
    access = Access("127.0.0.1", b"", Sessions(Wall()))
    followed = HOST | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    assert refused(access, "GET", "/events/1/2", followed) == ""
    assert refused(access, "GET", "/api/v1/endpoints", followed) == "cross_site"
    assert refused(access, "GET", "/metrics", followed) == "cross_site"
    for dest in ("iframe", "script", "image", "empty", "object", "embed", ""):
        assert refused(access, "GET", "/events/1/2", followed | {"Sec-Fetch-Dest": dest}) == "cross_site"
