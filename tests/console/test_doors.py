"""Logging in and out, and forms, by raw requests."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest

from tests.console.conftest import TOKEN
from tests.daemon.test_admin_access import ask

if TYPE_CHECKING:
    from tests.console.conftest import World

pytestmark = [
    pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True, scope="session"),
    pytest.mark.xdist_group("doors"),
]

FORM = "Content-Type: application/x-www-form-urlencoded"
OWN = ("Host: @", "Origin: http://@")

NOBODY = "01890a5d-ac96-774b-bcce-b302099a8057"


def log_in(url: str, token: str, *lines: str, **fields: str) -> tuple[int, bytes, bytes]:
    body = urlencode({"token": token} | fields).encode()
    return ask(url, "POST /login", *(lines or OWN), FORM, body=body)


def cookie_of(head: bytes) -> str:
    found = re.search(rb"set-cookie: (hookd_\d+=[^;]+)(.*)", head, re.IGNORECASE)
    assert found, head
    return found[1].decode()


def test_the_token_opens_a_session(guarded: World) -> None:
    for wrong in ("", TOKEN[:-1], TOKEN + "x", "wörng", "a" * 10_000):
        status, head, page = log_in(guarded.url, wrong, next="/live")
        assert status == 401
        assert b"set-cookie" not in head.lower()
        assert b'value="/live"' in page, "where it was going is not forgotten"
        assert wrong.encode() not in page or not wrong
    status, head, _ = log_in(guarded.url, TOKEN, next="/live")
    assert status == 303
    assert b"location: /live" in head.lower()
    flags = head.lower()
    assert b"httponly" in flags
    assert b"samesite=strict" in flags
    assert b"; secure" not in flags, "the browser came by http"
    cookie = cookie_of(head)
    assert TOKEN not in cookie
    for path in ("/", "/deliveries", "/api/v1/endpoints", "/metrics"):
        assert ask(guarded.url, f"GET {path}", "Host: @")[0] == 401
        assert ask(guarded.url, f"GET {path}", "Host: @", f"Cookie: {cookie}")[0] == 200
    behind_tls = log_in(guarded.url, TOKEN, "Host: hookd.example", "Origin: https://hookd.example")
    assert b"; secure" in behind_tls[1].lower()
    assert ask(guarded.url, "POST /logout", *OWN, f"Cookie: {cookie}")[0] == 303
    assert ask(guarded.url, "GET /", "Host: @", f"Cookie: {cookie}")[0] == 401
    assert TOKEN not in str(guarded.daemon.log())
    assert len(guarded.daemon.said("console: wrong tokens")) == 1
    assert guarded.daemon.said("console: logged in")


@pytest.mark.parametrize(
    "where",
    ["//evil.example", "https://evil.example/", "/\\evil.example", "javascript:alert(1)", "/a\r\nX: y", ""],
)
def test_logging_in_never_leads_elsewhere(guarded: World, where: str) -> None:
    status, head, _ = log_in(guarded.url, TOKEN, next=where)
    assert status == 303
    assert b"location: /\r\n" in head.lower() + b"\r\n"
    assert b"x: y" not in head


def test_a_link_from_another_site_finds_the_session(guarded: World) -> None:
    followed = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Dest: document", "Sec-Fetch-Mode: navigate")
    status, _, page = ask(guarded.url, "GET /live", "Host: @", *followed)
    assert status == 401
    assert b'http-equiv="refresh"' in page, "the cookie comes with the second request, which this page makes"
    assert b'http-equiv="refresh"' not in ask(guarded.url, "GET /live", "Host: @")[2], "and with no third"


CHANGES = (
    "/endpoints/add",
    f"/endpoints/{NOBODY}/pause",
    f"/endpoints/{NOBODY}/remove",
    "/resend",
    f"/events/{NOBODY}/resend",
    "/logout",
)


def test_forms_are_taken_from_here_only(guarded: World) -> None:
    cookie = f"Cookie: {cookie_of(log_in(guarded.url, TOKEN)[1])}"
    body = urlencode(
        {
            "url": "http://127.0.0.1:9001/",
            "tenant": "default",
            "types": "*",
            "sure": "yes",
            "state": "exhausted",
        }
    ).encode()
    for path in CHANGES:
        for lines in (
            ("Host: @",), ("Host: @", "Origin: http://evil.example"), ("Host: @", "Origin: null"), ("Host: @", "Sec-Fetch-Site: none"),
            ("Host: @", "Sec-Fetch-Site: same-site"), ("Host: @", "Sec-Fetch-Site: cross-site", "Origin: http://@"),
        ):  # fmt: skip
            assert ask(guarded.url, f"POST {path}", *lines, cookie, FORM, body=body)[0] == 403, (path, lines)
            bearer = f"Authorization: Bearer {TOKEN}"
            assert ask(guarded.url, f"POST {path}", *lines, bearer, FORM, body=body)[0] == 403, (path, lines)
        if path != "/logout":
            assert ask(guarded.url, f"POST {path}", *OWN, FORM, body=body)[0] == 401, (
                "and with a session only"
            )
        for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json"):
            assert (
                ask(guarded.url, f"POST {path}", *OWN, cookie, f"Content-Type: {kind}", body=body)[0] == 415
            )
    # a session does not open the API to pages of others either
    gone = ("Host: @", "Sec-Fetch-Site: same-site", cookie)
    assert ask(guarded.url, f"DELETE /api/v1/endpoints/{NOBODY}", *gone)[0] == 403
    assert ask(guarded.url, f"DELETE /api/v1/endpoints/{NOBODY}", "Host: @", cookie)[0] == 401
    assert ask(guarded.url, f"DELETE /api/v1/endpoints/{NOBODY}", *OWN, cookie)[0] == 404


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [("GET /nothing", 404, "Not found"), ("GET /endpoints/x", 422, "is no id"), (f"GET /endpoints/{NOBODY}", 404, "There is no endpoint"),
     (f"GET /events/{NOBODY}/99999999999999999999", 404, "no number"), (f"GET /events/{NOBODY}/1", 404, "no delivery 1"),
     ("GET /deliveries?cursor=nonsense", 422, "no cursor"), ("GET /events?path=%24((", 422, "no SQL/JSON path"), ("GET /search?q=a:b", 422, "nothing to search by"),
     ("GET /deliveries/12345678", 404, "There is no delivery"), ("GET /live/stream?since=x&status=x", 422, "no number"),
     ("GET /events?since=9999999999d", 422, "no time"), ("GET /?range=nonsense", 200, "Overview"), ("GET /resend", 422, "Say which"),
     ("GET /events?tenant=%00", 422, "does not print"), ("GET /endpoints?url=%00", 422, "does not print")],
)  # fmt: skip
def test_what_cannot_be_shown_is_said_in_a_page(guarded: World, line: str, status: int, said: str) -> None:
    got, head, page = ask(guarded.url, line, "Host: @", f"Authorization: Bearer {TOKEN}")
    assert got == status, page.decode()
    assert b"text/html" in head
    assert b"content-security-policy" in head.lower()
    assert said in page.decode()
    assert not guarded.daemon.said("a request to the admin server failed")


@pytest.mark.parametrize("body", [b"\xff=\xff", b"reason=%00", b"reason=a%00b&overlap=%00"])
def test_a_form_that_cannot_be_read_is_refused(guarded: World, body: bytes) -> None:
    bearer = f"Authorization: Bearer {TOKEN}"
    for path in (f"/endpoints/{NOBODY}/pause", f"/endpoints/{NOBODY}/rotate", "/endpoints/add", "/resend"):
        status, _, page = ask(guarded.url, f"POST {path}", *OWN, bearer, FORM, body=body)
        assert status == 422, (path, page.decode())
    assert not guarded.daemon.said("a request to the admin server failed")


@pytest.mark.parametrize(
    ("charset", "body"),
    [
        ("punycode", 200_000 * b"x" + b"-" + 200_000 * b"a"),
        ("unicode_escape", b"token=\\ud800"),
        ("utf-16", b"\0t"),
        ("nonsense", b"token=x"),
    ],
)
def test_who_asks_does_not_choose_the_decoder(guarded: World, charset: str, body: bytes) -> None:
    """That of punycode takes minutes for a megabyte, in which nothing would be delivered; and nobody has logged in yet."""
    assert ask(guarded.url, "POST /login", *OWN, f"{FORM}; charset={charset}", body=body)[0] == 415
    typed = urlencode({"token": TOKEN}).encode()
    assert ask(guarded.url, "POST /login", *OWN, f"{FORM}; charset=UTF-8", body=typed)[0] == 303
