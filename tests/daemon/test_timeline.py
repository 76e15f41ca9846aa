"""A delivery as people see it, beside what really went over the wire; and what the daemon counted meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import trustme

from tests.daemon.test_api import Client
from tests.net.test_exchange import server_context
from tests.producing import add_endpoint_with_id, fetch, send, wait_empty
from tests.receiver import Call, Receiver, answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess

PAYLOAD = '{"id": 12345678901234567890, "b": "é", "a": 1.10}'


def test_a_delivery_is_shown_as_it_was_sent_and_answered(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = start_daemon(HOOKD_RETRY__SCHEDULE='["10ms"]')
    api = Client(daemon.admin)

    async def go() -> None:
        async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
            writer.write(
                answer(503, b"busy <b>now</b>", x_why="load") if call.number == 1 else answer(200, b"ok")
            )

        async with Receiver(handle) as receiver:
            _, endpoint = await add_endpoint_with_id(
                dsn, receiver.url, headers={"authorization": "Bearer s3cret"}
            )
            event = await send(dsn, "thing.made", PAYLOAD, headers='{"traceparent": "00-1-2-01"}')
            await wait_empty(dsn)
            number = (await fetch(dsn, "select delivery_id from hookd.attempt"))[0]["delivery_id"]
            for path in (f"/deliveries/{number}?event={event}", f"/deliveries/{number}"):
                status, shown = await asyncio.to_thread(api, "GET", path)
                assert (status, shown["state"], shown["attempts_made"]) == (200, "delivered", 2)
                for attempt, call in zip(shown["attempts"], receiver.calls, strict=True):
                    as_sent(attempt["request"], call)
            assert "s3cret" not in str(shown)
            failed, delivered = shown["attempts"]
            assert failed["words"].startswith("failed: answered 503 after ")
            assert failed["answer"]["body"] == "busy <b>now</b>"
            assert ["x-why", "load"] in failed["answer"]["headers"]
            assert [p["name"] for p in failed["phases"]] == ["dns", "connect", "first_byte", "rest"]
            assert delivered["words"].startswith("delivered: answered 200 after ")
            assert shown["because"] == delivered["words"]
            # the secret that signed then is gone: nothing is made up
            for _ in range(2):
                rotated, _answer = await asyncio.to_thread(
                    api, "POST", f"/endpoints/{endpoint}/rotate", {"overlap": "0s"}
                )
                assert rotated == 200
            _, shown = await asyncio.to_thread(api, "GET", f"/deliveries/{number}?event={event}")
            again = shown["attempts"][0]["request"]
            assert (again["signed"], again["changed"]) == (False, True)
            assert dict(again["headers"])["webhook-signature"] == "v1,(not kept)"
            # resent: a new delivery, and the old one stays as it is
            status, done = await asyncio.to_thread(api, "POST", f"/deliveries/{number}/resend?event={event}")
            assert (status, done) == (202, {"queued": 1})
            await wait_empty(dsn)
            assert receiver.calls[2].event_id == event
            _, listed = await asyncio.to_thread(api, "GET", f"/deliveries?event={event}")
            assert [(d["state"], d["replay"], d["attempts"]) for d in listed["data"]] == [
                ("delivered", True, 1),
                ("delivered", False, 2),
            ]
            status, trail = await asyncio.to_thread(
                api, "GET", f"/audit?endpoint={endpoint}", None, hookd_actor="alice"
            )
            assert [(t["action"], t["who"]) for t in trail["data"]] == [
                ("delivery.resend", "loopback"),
                ("endpoint.rotate", "loopback"),
                ("endpoint.rotate", "loopback"),
            ]
            assert trail["data"][0]["delivery_id"] == number

    asyncio.run(go())
    assert daemon.stop() == 0
    counted = asyncio.run(
        fetch(
            dsn,
            "select seconds, sum((figures ->> 'verdict.delivered')::integer) as delivered,"
            " sum((figures ->> 'verdict.retry')::integer) as retried from hookd.tally group by 1 order by 1",
        )
    )
    assert [tuple(r) for r in counted] == [(60, 2, 1), (900, 2, 1)]
    fared = asyncio.run(
        fetch(dsn, "select sum(delivered)::integer, sum(failed)::integer from hookd.endpoint_hour")
    )
    assert tuple(fared[0]) == (2, 1)


def as_sent(request: dict[str, Any], call: Call) -> None:
    """Every header and every byte, but for the values of the endpoint's own headers."""
    shown = {name.lower(): value for name, value in request["headers"]}
    assert shown.pop("authorization") == "***"
    sent = dict(call.headers)
    assert sent.pop("authorization") == "Bearer s3cret"
    assert shown == sent
    assert request["body"].encode() == call.body
    assert request["line"] == f"{call.method} {call.path} {call.version}"


def test_the_handshake_is_told_apart_from_the_connection(
    dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    daemon = start_daemon(HOOKD_NETWORK__CA_FILE=str(tmp_path / "ca.pem"))
    api = Client(daemon.admin)

    async def go() -> None:
        async with Receiver(context=server_context(authority, "localhost")) as receiver:
            await add_endpoint_with_id(dsn, receiver.url)
            for _ in range(2):
                event = await send(dsn, "thing.made", PAYLOAD)
                await wait_empty(dsn)
            rows = await fetch(dsn, "select tls_ms, connect_ms, total_ms from hookd.attempt order by at")
            first, second = rows
            assert 0 < first["tls_ms"] < first["total_ms"]
            assert (second["tls_ms"], second["connect_ms"]) == (None, None), "on the connection that was open"
            _, listed = await asyncio.to_thread(api, "GET", "/attempts")
            (made,) = [a for a in listed["data"] if a["tls_ms"] is not None]
            assert made["event_id"] != event
            path = f"/deliveries/{made['delivery_id']}?event={made['event_id']}"
            _, shown = await asyncio.to_thread(api, "GET", path)
            phases = [p["name"] for p in shown["attempts"][0]["phases"]]
            assert phases == ["dns", "connect", "tls", "first_byte", "rest"]

    asyncio.run(go())


def test_who_does_what_is_written_down(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    api = Client(start_daemon(HOOKD_NETWORK__NAMESERVERS='["127.0.0.1"]').admin, hookd_actor="alice\t")
    status, made = api("POST", "/endpoints", {"url": "https://example.com/", "headers": {"x-a": "s3cret"}})
    assert status == 201
    path = f"/endpoints/{made['id']}"
    assert api("POST", f"{path}/pause", {"reason": "why not"})[0] == 200
    assert api("POST", f"{path}/resume", {"missed": "some"})[0] == 422
    assert api("PATCH", path, {"filter": "$$"})[0] == 422
    assert api("POST", f"{path}/rotate", {"secret": "whsec_" + "QUJD" * 8})[0] == 200
    assert api("DELETE", path)[0] == 204
    assert api("POST", f"{path}/pause")[0] == 422, "a removed one cannot be paused"
    status, trail = api("GET", f"/audit?endpoint={made['id']}")
    assert [(t["via"], t["who"], t["action"]) for t in reversed(trail["data"])] == [
        ("api", "loopback, for alice", f"endpoint.{verb}") for verb in ("add", "pause", "rotate", "remove")
    ]
    assert "s3cret" not in str(trail)
    assert "QUJD" not in str(trail)
    assert trail["data"][2]["details"] == {"reason": "why not"}
