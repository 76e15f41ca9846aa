"""``/api/v1``: how an application registers callback URLs."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from tests.conftest import run_sql
from tests.producing import send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess

NOBODY = "01890a5d-ac96-774b-bcce-b302099a8057"


class Client:
    def __init__(self, base: str, **headers: str) -> None:
        self.base = base
        self.headers = headers

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base}/api/v1{path}", data=data, method=method)
        for name, value in ({"content-type": "application/json"} | self.headers | headers).items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=20) as got:
                return got.status, json.loads(got.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())


@pytest.fixture
def api(start_daemon: Callable[..., DaemonProcess]) -> Client:
    return Client(start_daemon(HOOKD_RETRY__SCHEDULE="[]").admin)


def test_an_endpoint_from_birth_to_removal(dsn: str, api: Client) -> None:
    async def go() -> None:
        async with Receiver() as receiver:
            status, made = await asyncio.to_thread(
                api, "POST", "/endpoints",
                {"url": receiver.url, "tenant": "acme", "types": ["user.*"], "headers": {"x-a": "b"}, "rate": 50},
            )  # fmt: skip
            assert status == 201
            assert made["secret"].startswith("whsec_")
            path = f"/endpoints/{made['id']}"
            status, shown = await asyncio.to_thread(api, "GET", path)
            assert status == 200
            assert "secret" not in shown
            assert shown["header_names"] == ["x-a"]
            event = await send(dsn, "user.created", tenant="acme")
            await wait_empty(dsn)
            assert receiver.calls[0].headers["x-a"] == "b"
            _, found = await asyncio.to_thread(api, "GET", f"/events/{event}")
            assert found["payload"] == {}
            assert found["deliveries"][0]["state"] == "delivered"
            _, deliveries = await asyncio.to_thread(api, "GET", f"/deliveries?event={event}")
            assert len(deliveries["data"]) == 1
            status, queued = await asyncio.to_thread(api, "POST", "/replay", {"event": event})
            assert (status, queued["queued"]) == (202, 1)
            await wait_empty(dsn)
            assert len(receiver.calls) == 2
            _, changed = await asyncio.to_thread(
                api, "PATCH", path, {"rate": None, "types": ["*"], "headers": {}}
            )
            assert (changed["rate"], changed["types"], changed["header_names"]) == (None, ["*"], None)
            assert changed["url"] == receiver.url
            assert (await asyncio.to_thread(api, "POST", f"{path}/pause"))[1]["state"] == "paused"
            assert (await asyncio.to_thread(api, "POST", f"{path}/resume"))[1]["state"] == "active"
            _, rotated = await asyncio.to_thread(api, "POST", f"{path}/rotate", {"overlap": "1h"})
            assert rotated["secret"] != made["secret"]
            _, listed = await asyncio.to_thread(api, "GET", "/endpoints?tenant=acme")
            assert [e["id"] for e in listed["data"]] == [made["id"]]
            assert (await asyncio.to_thread(api, "GET", "/endpoints?tenant=other"))[1]["data"] == []
            assert (await asyncio.to_thread(api, "DELETE", path))[0] == 204
            for verb, where in (("PATCH", path), ("POST", f"{path}/rotate")):
                status, said = await asyncio.to_thread(
                    api, verb, where, {"rate": 5} if verb == "PATCH" else {}
                )
                assert (status, "was removed" in said["detail"]) == (422, True), said
            assert (await asyncio.to_thread(api, "GET", "/endpoints"))[1]["data"] == []

    asyncio.run(go())


def test_replay_by_type_at_a_rate_and_of_what_was_never_owed(dsn: str, api: Client) -> None:
    async def go() -> None:
        async with Receiver() as first, Receiver() as late:
            _, one = await asyncio.to_thread(api, "POST", "/endpoints", {"url": first.url})
            for type_ in ("user.created", "user.deleted", "order.paid", "user.created"):
                await send(dsn, type_)
            await wait_empty(dsn)
            assert len(first.calls) == 4
            asked: dict[str, Any] = {"types": ["user.*"], "states": ["delivered"]}
            counted = await asyncio.to_thread(api, "POST", "/replay", asked | {"dry_run": True})
            assert counted == (200, {"matching": 3, "queued": 0, "of_disabled_endpoints": 0})
            for bounds, matching in (
                ({"until": "1900-01-01T00:00:00Z"}, 0), ({"until": "0001-01-01T00:00:00Z"}, 0), ({"since": "9999-12-31T00:00:00Z"}, 0),
                ({"since": "0001-01-01T00:00:00Z"}, 3), ({"since": "1900-01-01T00:00:00Z", "until": "9999-12-31T00:00:00Z"}, 3),
            ):  # fmt: skip
                _, found = await asyncio.to_thread(api, "POST", "/replay", asked | bounds | {"dry_run": True})
                assert found["matching"] == matching, bounds
            before = time.monotonic()
            status, done = await asyncio.to_thread(api, "POST", "/replay", asked | {"rate": 2})
            assert (status, done["queued"]) == (202, 3)
            await wait_empty(dsn)
            assert len(first.calls) == 7
            assert time.monotonic() - before > 0.9, "the third of two a second, one second after the first"

            _, two = await asyncio.to_thread(
                api, "POST", "/endpoints", {"url": late.url, "types": ["user.created"]}
            )
            missed = {"endpoint": two["id"], "missing": True}
            assert (await asyncio.to_thread(api, "POST", "/replay", missed))[1]["queued"] == 2
            await wait_empty(dsn)
            assert {call.headers["webhook-id"] for call in late.calls} == {
                first.calls[0].headers["webhook-id"],
                first.calls[3].headers["webhook-id"],
            }
            assert (await asyncio.to_thread(api, "POST", "/replay", missed))[1]["matching"] == 0

            await asyncio.to_thread(
                run_sql, dsn, f"update hookd.endpoint set state = 'disabled' where id = '{one['id']}'"
            )
            disabled = await asyncio.to_thread(
                api, "POST", "/replay", {"endpoint": one["id"], "states": ["delivered"]}
            )
            assert disabled[1] == {"matching": 0, "queued": 0, "of_disabled_endpoints": 4}
            # one of its two endpoints is disabled, then both
            event = first.calls[0].headers["webhook-id"]
            status, done = await asyncio.to_thread(api, "POST", f"/events/{event}/resend")
            assert (status, done["queued"]) == (202, 1)
            await wait_empty(dsn)
            assert len(late.calls) == 3
            await asyncio.to_thread(run_sql, dsn, "update hookd.endpoint set state = 'disabled'")
            status, done = await asyncio.to_thread(api, "POST", f"/events/{event}/resend")
            assert status == 409
            assert "resume one first" in done["detail"]
            for missing in (True, False):
                unknown = {"endpoint": str(UUID(int=7)), "missing": missing}
                status, done = await asyncio.to_thread(api, "POST", "/replay", unknown)
                assert status == 404
                assert "there is no endpoint" in done["detail"]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "/endpoints", {"url": "http://10.0.0.1/"}, 422, "the address is not allowed"),
        ("POST", "/endpoints", {"url": "nonsense"}, 422, "write https://host/path"),
        ("POST", "/endpoints", {"url": "http://127.0.0.1/", "tpes": []}, 422, "unknown field 'tpes'"),
        ("POST", "/endpoints", {}, 422, "missing required field 'url'"),
        ("POST", "/endpoints", {"url": "http://127.0.0.1/", "headers": {"Host": "x"}}, 422, "set by hookd"),
        ("POST", "/endpoints", {"url": "http://127.0.0.1/", "filter": "$$"}, 422, "no SQL/JSON path"),
        ("POST", "/endpoints", {"url": "http://127.0.0.1/", "rate": -1}, 422, "rate: expected 'float' > 0"),
        (
            "POST",
            "/endpoints",
            {"url": "http://127.0.0.1/", "format": "xml"},
            422,
            "format: invalid enum value 'xml'",
        ),
        (
            "POST",
            "/endpoints",
            {"url": "https://example.com/", "format": "thin"},
            422,
            "delivery.thin_url is not set",
        ),
        ("POST", "/endpoints", b"{", 400, "not JSON"),
        ("GET", f"/endpoints/{NOBODY}", None, 404, "there is no endpoint"),
        ("GET", "/endpoints/x", None, 422, "id: invalid UUID"),
        ("PATCH", f"/endpoints/{NOBODY}", {"rate": 1}, 404, "there is no endpoint"),
        ("GET", f"/events/{NOBODY}", None, 404, "there is no event"),
        ("GET", "/endpoints?limit=0", None, 422, "limit: expected 'int' >= 1"),
        ("POST", "/replay", {}, 422, "say what to replay"),
        (
            "POST",
            "/replay",
            {"missing": True, "since": "2026-11-01T00:00:00Z"},
            422,
            "missing goes with endpoint",
        ),
        ("POST", "/replay", {"types": ["user.*"], "rate": 0}, 422, "rate: expected 'float' > 0"),
        ("GET", "/nothing", None, 404, ""),
        ("PUT", "/endpoints", {}, 405, ""),
    ],
)
def test_errors(api: Client, method: str, path: str, body: Any, status: int, said: str) -> None:
    got, answer = api(method, path, body)
    assert got == status, answer
    assert said in answer["detail"]


def test_browsers_of_other_sites_are_kept_out(api: Client) -> None:
    body = {"url": "http://127.0.0.1:9001/"}
    assert api("POST", "/endpoints", body, content_type="text/plain")[0] == 415
    assert api("POST", "/endpoints", body, sec_fetch_site="cross-site")[0] == 403
    assert api("GET", "/endpoints", host="rebound.example")[0] == 403


def test_the_token(tmp_path: Path, start_daemon: Callable[..., DaemonProcess]) -> None:
    (tmp_path / "token").write_text("t0ken-t0ken-t0ken\n")
    (tmp_path / "token").chmod(0o600)
    daemon = start_daemon(HOOKD_ADMIN__TOKEN_FILE=str(tmp_path / "token"))
    assert Client(daemon.admin)("GET", "/endpoints")[0] == 401
    assert Client(daemon.admin, authorization="Bearer wrong")("GET", "/endpoints")[0] == 401
    assert Client(daemon.admin, authorization="Bearer t0ken-t0ken-t0ken")("GET", "/endpoints")[0] == 200
    with urllib.request.urlopen(daemon.admin + "/healthz", timeout=10) as got:
        assert got.status == 200


def test_a_port_that_is_taken_is_skipped(start_daemon: Callable[..., DaemonProcess]) -> None:
    first = start_daemon()
    second = start_daemon(HOOKD_ADMIN__LISTEN=first.admin.removeprefix("http://"))
    assert second.wait_for("admin server is off")["reason"] == "another process listens there"
    assert second.stop() == 0
