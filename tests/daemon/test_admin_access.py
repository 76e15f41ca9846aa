"""Who may ask the admin server: raw requests, as browsers and programs send them."""

from __future__ import annotations

import json
import re
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookd.admin.access import Access
from hookd.admin.sessions import Sessions
from tests.cli import Cli
from tests.fuzzing import examples

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess

pytestmark = pytest.mark.usefixtures("one_server")

TOKEN = "0123456789abcdef0123456789abcdef"

ENDPOINT = b'{"url": "http://127.0.0.1:9001/"}'

NOBODY = "01890a5d-ac96-774b-bcce-b302099a8057"


def ask(admin: str, line: str, *lines: str | bytes, body: bytes = b"") -> tuple[int, bytes, bytes]:
    """One raw request; ``@`` in a line stands for the host and port that are listened on.  Status, head, body."""
    where = urlsplit(admin)
    assert where.hostname
    assert where.port
    head = [f"{line} HTTP/1.1".encode()]
    head += [
        text if isinstance(text, bytes) else text.replace("@", f"{where.hostname}:{where.port}").encode()
        for text in lines
    ]
    head.append(b"Connection: close")
    if body:
        head.append(b"Content-Length: %d" % len(body))
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.sendall(b"\r\n".join(head) + b"\r\n\r\n" + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    top, _, rest = answer.partition(b"\r\n\r\n")
    assert b"traceback" not in answer.lower()
    return int(top.split(b" ")[1]), top, rest


JSON = "Content-Type: application/json"
FORM = "Content-Type: application/x-www-form-urlencoded"
CHANGES = (
    ("POST /api/v1/endpoints", ENDPOINT),
    (f"POST /api/v1/endpoints/{NOBODY}/pause", b""),
    (f"POST /api/v1/endpoints/{NOBODY}/rotate", b"{}"),
    (f"PATCH /api/v1/endpoints/{NOBODY}", b"{}"),
    (f"DELETE /api/v1/endpoints/{NOBODY}", b""),
    ("POST /api/v1/replay", b'{"tenant": "default"}'),
)

FOREIGN = (
    ("Host: evil.example",),
    ("Host: evil.example:8440",),
    ("Host: rebound.localhost.evil.example",),
    ("Host: 127.0.0.1.evil.example",),
    ("Host: 0.0.0.0:8440",),
    ("Host: 127.1",),
    ("Host: 2130706433",),
    ("Host: 10.0.0.1",),
    ("Host: ",),
    ("Host: @", "Origin: http://evil.example"),
    ("Host: @", "Origin: https://evil.example:8440"),
    ("Host: @", "Origin: null"),
    ("Host: @", "Origin: file://"),
    ("Host: @", "Origin: http://localhost:3000"),
    ("Host: @", "Origin: http://@.evil.example"),
    ("Host: @", "Origin: http://evil.example/@"),
    ("Host: @", "Origin: "),
    ("Host: @", "Origin: http://@, http://evil.example"),
    ("Host: @", "Sec-Fetch-Site: cross-site"),
    ("Host: @", "Sec-Fetch-Site: same-site"),
    ("Host: @", "Sec-Fetch-Site: cross-site", "Origin: http://@"),
    ("Host: @", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"),
    ("Host: @", "Sec-Fetch-Site: SAME-ORIGIN"),
)


def test_pages_of_others_change_nothing_and_read_nothing(
    tmp_path: Path, dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    admin = start_daemon().admin
    for line, body in CHANGES:
        for lines in FOREIGN:
            status, head, _ = ask(admin, line, *lines, JSON, body=body)
            assert status in (400, 403), (line, lines, head)
            assert b"access-control" not in head.lower()
    for lines in FOREIGN:
        for path in ("/api/v1/endpoints", "/api/v1/status", "/metrics"):
            assert ask(admin, f"GET {path}", *lines)[0] in (400, 403), (path, lines)
    for content_type in (
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
        "text/plain; application/json", "application/json-patch+json",
    ):  # fmt: skip
        status, *_ = ask(
            admin, "POST /api/v1/endpoints", "Host: @", f"Content-Type: {content_type}", body=ENDPOINT
        )
        assert status == 415, content_type
    assert Cli(dsn, tmp_path).json("endpoint", "list") == [], "nothing of all that did anything"


def test_programs_and_the_console_are_answered(
    tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    admin = start_daemon().admin
    for lines in (
        ("Host: @",),
        ("Host: localhost:1",),
        ("Host: LOCALHOST",),
        ("Host: 127.0.0.1",),
        ("Host: 127.0.0.2:80",),
        ("Host: [::1]:8440",),
        ("Host: [::1]",),
        ("Host: @", "Origin: http://@", "Sec-Fetch-Site: same-origin"),
        ("Host: @", "Sec-Fetch-Site: none"),
    ):
        status, *_ = ask(admin, "POST /api/v1/endpoints", *lines, JSON, body=ENDPOINT)
        assert status == 201, lines
        assert ask(admin, "GET /api/v1/endpoints", *lines)[0] == 200
    followed = (
        "Host: @",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Mode: navigate",
        "Sec-Fetch-Dest: document",
    )
    for page in ("/", "/deliveries?state=exhausted", f"/endpoints/{NOBODY}"):
        assert ask(admin, f"GET {page}", *followed)[0] in (200, 404), "a link may lead to the console"
    assert ask(admin, "GET /", "Host: @", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Dest: iframe")[0] == 403
    assert ask(admin, "GET /api/v1/status", *followed)[0] == 403
    assert ask(admin, "GET /healthz", "Host: pod.example")[0] == 200, "probes know no name"
    health = Cli("embedded", tmp_path).ok(
        "health",
        HOOKD_ADMIN__LISTEN=admin.removeprefix("http://"),
        HTTP_PROXY="http://127.0.0.1:9/",
        http_proxy="http://127.0.0.1:9/",
    )
    assert health.strip() == "ready", "hookd health asks the daemon and no proxy"


def test_every_answer_carries_the_policy_and_nothing_is_inline(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    admin = start_daemon().admin
    for line, status in (
        ("GET /", 200), ("GET /console.js", 200), ("GET /console.css", 200), ("GET /icon.svg", 200), ("GET /healthz", 200),
        ("GET /metrics", 200), ("GET /endpoints", 200), ("GET /events", 200), ("GET /deliveries", 200), ("GET /dead-letters", 200),
        ("GET /live", 200), ("GET /audit", 200), ("GET /deliveries?state=x", 422), ("GET /resend?state=exhausted", 200),
        ("GET /api/v1/status", 200), ("GET /nothing", 404), ("PUT /api/v1/endpoints", 405), ("OPTIONS /api/v1/endpoints", 405),
        ("POST /api/v1/nothing", 403), ("GET /api/v1/endpoints/x", 422), ("GET /login", 303), ("TRACE /", 403), ("POST /endpoints/add", 403),
    ):  # fmt: skip
        got, head, _ = ask(
            admin,
            line,
            "Host: @",
        )
        assert got == status, line
        lower = head.lower()
        policy = re.search(rb"content-security-policy: (.*)", lower)
        assert policy, line
        assert b"default-src 'none'" in policy[1]
        assert b"unsafe" not in policy[1]
        assert b"frame-ancestors 'none'" in policy[1]
        assert b"x-content-type-options: nosniff" in lower
        assert b"access-control-" not in lower
        assert b"set-cookie" not in lower
    _, head, page = ask(admin, "GET /", "Host: @")
    assert b"text/html" in head
    assert not re.search(rb"<script(?![^>]*\bsrc=)|<style|\bon\w+\s*=|style\s*=|javascript:", page)
    assert all(m.startswith((b"/", b"#")) for m in re.findall(rb'(?:src|href|action)="([^"]*)"', page))
    assert not re.search(rb'(?:src|href|action)="//', page)
    script = ask(admin, "GET /console.js", "Host: @")[2]
    assert b"innerHTML" not in script
    assert b"eval(" not in script
    assert b"document.write" not in script


def test_what_a_tenant_wrote_is_text_to_the_console(start_daemon: Callable[..., DaemonProcess]) -> None:
    admin = start_daemon().admin
    body = b'{"url": "http://127.0.0.1:9001/<script>alert(1)</script>", "description": "<img src=x onerror=alert(1)>"}'
    assert ask(admin, "POST /api/v1/endpoints", "Host: @", JSON, body=body)[0] == 201
    _, head, _ = ask(admin, "GET /api/v1/endpoints", "Host: @")
    assert b"application/json" in head.lower()
    assert b"nosniff" in head.lower()


def test_odd_heads_end_in_an_answer(start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon()
    for line, lines in (
        ("GET /", ()),
        ("GET /", ("Host: @", "Host: evil.example")),
        ("GET http://evil.example/", ("Host: evil.example",)),
        ("GET /", (b"Host: \xff\xfe",)),
        ("GET /", (b"Host: 127.0.0.1\x00",)),
        ("GET /", ("Host: @", b"Origin: \xff")),
        ("GET /" + "a" * 10_000, ("Host: @",)),
        ("GET /", ("Host: @", "X: " + "a" * 10_000)),
        ("GET /../../etc/passwd", ("Host: evil.example",)),
        ("POST /api/v1/endpoints", ("Host: @", JSON, "Content-Length: 5", "Transfer-Encoding: chunked")),
    ):
        status, *_ = ask(daemon.admin, line, *lines)
        assert 400 <= status < 500, (line[:40], lines)
    big = b'{"url": "' + b"a" * 1024 * 1024 + b'"}'
    assert ask(daemon.admin, "POST /api/v1/endpoints", "Host: @", JSON, body=big)[0] == 413
    assert not daemon.said("a request to the admin server failed")


def test_the_token_is_wanted_for_everything_but_probes(
    tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "token").chmod(0o600)
    daemon = start_daemon(HOOKD_ADMIN__TOKEN_FILE=str(tmp_path / "token"))
    right = f"Authorization: Bearer {TOKEN}"
    for wrong in (
        "X: y", "Authorization: Bearer", "Authorization: Bearer ", f"Authorization: Bearer {TOKEN[:-1]}", f"Authorization: {TOKEN}",
        f"Authorization: Bearer {TOKEN}x", f"Authorization: Basic {TOKEN}", f"Authorization: Bearer {TOKEN.upper()}",
        b"Authorization: Bearer \xff\xfe", "Authorization: Bearer " + "a" * 8000, f"Cookie: token={TOKEN}",
    ):  # fmt: skip
        for line, body in (*CHANGES, ("GET /", b""), ("GET /metrics", b""), ("GET /api/v1/endpoints", b"")):
            status, head, answer = ask(daemon.admin, line, "Host: @", wrong, JSON, body=body)
            assert status == 401, (line, wrong)
            assert b"www-authenticate: bearer" in head.lower()
            assert TOKEN.encode() not in answer
    assert ask(daemon.admin, f"GET /api/v1/endpoints?token={TOKEN}", "Host: @")[0] == 401
    assert ask(daemon.admin, "GET /healthz", "Host: @")[0] == 200
    assert ask(daemon.admin, "GET /api/v1/endpoints", "Host: @", right.replace("Bearer", "bearer"))[0] == 200
    status, *_ = ask(daemon.admin, "POST /api/v1/endpoints", "Host: @", right, JSON, body=ENDPOINT)
    assert status == 201
    foreign = ("Host: @", right, "Origin: http://evil.example", JSON)
    assert ask(daemon.admin, "POST /api/v1/endpoints", *foreign, body=ENDPOINT)[0] == 403
    assert TOKEN not in str(daemon.log())


def test_what_changes_something_shows_that_no_page_sent_it(
    tmp_path: Path, dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    admin = start_daemon().admin
    made = json.loads(ask(admin, "POST /api/v1/endpoints", "Host: @", JSON, body=ENDPOINT)[2])["id"]
    bare = (
        f"POST /api/v1/endpoints/{made}/pause", f"POST /api/v1/endpoints/{made}/rotate",
        f"POST /api/v1/events/{NOBODY}/resend", f"POST /api/v1/endpoints/{made}/verify",
    )  # fmt: skip
    for line in bare:
        # an old browser's form or fetch: no Origin, no Sec-Fetch-Site, and what CORS calls simple
        for lines in (
            (),
            ("Content-Type: text/plain",),
            (FORM,),
            ("Accept: */*",),
            ("Authorization: Bearer x",),
        ):
            status, _, answer = ask(admin, line, "Host: @", *lines)
            assert status == 403, (line, lines)
            said = json.loads(answer)
            assert said["code"] == "cross_site"
            assert "Content-Type: application/json" in said["detail"]
            assert "Hookd-Actor" in said["detail"]
    assert [e["state"] for e in Cli(dsn, tmp_path).json("endpoint", "list")] == ["active"]
    for lines in (
        (JSON,), ("Hookd-Actor: alice",), ("hookd-actor: ",), ("Sec-Fetch-Site: same-origin",), ("Sec-Fetch-Site: none",),
        ("Origin: http://@",), ("Content-Type: Application/JSON; charset=utf-8",),
    ):  # fmt: skip
        assert ask(admin, f"POST /api/v1/endpoints/{made}/pause", "Host: @", *lines)[0] == 200, lines
        assert ask(admin, f"POST /api/v1/endpoints/{made}/resume", "Host: @", *lines)[0] == 200, lines
    for proof in (JSON, "Hookd-Actor: alice"):
        assert ask(admin, f"DELETE /api/v1/endpoints/{made}", "Host: evil.example", proof)[0] == 403
        foreign = ("Host: @", proof, "Origin: http://evil.example")
        assert ask(admin, f"DELETE /api/v1/endpoints/{made}", *foreign)[0] == 403
    # no page sends this method to another site without asking
    assert ask(admin, f"DELETE /api/v1/endpoints/{made}", "Host: @")[0] == 204


def test_a_token_opens_no_other_host(tmp_path: Path, start_daemon: Callable[..., DaemonProcess]) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    right = f"Authorization: Bearer {TOKEN}"
    admin = start_daemon(
        HOOKD_ADMIN__TOKEN_FILE=str(tmp_path / "token"), HOOKD_ADMIN__HOSTS='["Hookd.Example"]'
    ).admin
    for host, status in (
        ("@", 200), ("localhost", 200), ("hookd.example", 200), ("HOOKD.example:443", 200), ("evil.example", 403),
        ("hookd.example.evil.example", 403), ("x.hookd.example", 403), ("10.0.0.1", 403), ("", 403), (":80", 403), ("[]", 403),
    ):  # fmt: skip
        got, _, answer = ask(admin, "GET /api/v1/endpoints", f"Host: {host}", right)
        assert got == status, host
        assert got == 200 or b"admin.hosts" in answer
    assert ask(admin, "GET /login", "Host: evil.example")[0] == 403, "and nobody is asked for it there"
    assert ask(admin, "GET /healthz", "Host: pod.example")[0] == 200


@pytest.mark.parametrize(
    ("listen", "names", "host", "served"),
    [
        ("0.0.0.0", (), "hookd.example", True),
        ("::", (), "hookd.example:8440", True),
        ("10.0.0.1", (), "hookd.example", True),
        ("10.0.0.1", (), "", False),
        ("10.0.0.1", ("hookd.example",), "hookd.example", True),
        ("10.0.0.1", ("hookd.example",), "10.0.0.1:8440", True),
        ("10.0.0.1", ("hookd.example",), "evil.example", False),
        ("127.0.0.1", (), "hookd.example", False),
        ("::1", (), "hookd.example", False),
        ("localhost", (), "hookd.example", False),
        ("127.0.0.1", (), "[::1]:8440", True),
    ],
)
def test_which_hosts_are_served_with_a_token(
    listen: str, names: tuple[str, ...], host: str, served: bool
) -> None:
    access = Access(listen, TOKEN.encode(), Sessions(lambda: 0.0), names)
    headers = {"Host": host, "Authorization": f"Bearer {TOKEN}"}
    refused = access.refusal("GET", "/api/v1/endpoints", headers, has_body=False, content_type="")
    assert (refused is None) is served


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [("", 0o600, "holds no token"), ("\n", 0o600, "holds no token"), ("short", 0o600, "holds no token"),
     ("with a blank in the middle", 0o600, "holds no token"), (TOKEN, 0o644, "can be read or written by others")],
)  # fmt: skip
def test_a_token_that_is_none_is_refused_at_start(tmp_path: Path, content: str, mode: int, said: str) -> None:
    (tmp_path / "token").write_text(content)
    (tmp_path / "token").chmod(mode)
    cli = Cli("embedded", tmp_path)
    for command in ("check-config", "run"):
        problem = cli.fails(
            2, command, HOOKD_ADMIN__TOKEN_FILE=str(tmp_path / "token"), HOOKD_ADMIN__LISTEN="0.0.0.0:0"
        )
        assert said in problem
        assert not content.strip() or content not in problem


@examples(1000)
@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from([b"", TOKEN.encode()]))
def test_no_head_breaks_the_gate(host: str, other: str, token: bytes) -> None:
    access = Access("127.0.0.1", token, Sessions(lambda: 0.0))
    headers = {"Host": host, "Origin": other, "Authorization": other, "Sec-Fetch-Site": other}
    refused = access.refusal("POST", "/", headers, has_body=True, content_type="application/json")
    assert refused is not None
    assert not token or Access("127.0.0.1", token, Sessions(lambda: 0.0)).refusal(
        "GET", "/", {"Host": host, "Authorization": other}, has_body=False, content_type=""
    )
