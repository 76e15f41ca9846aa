"""Endpoints that have to show first that they want to be called."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookd.core.challenge import TYPE, challenge_in
from hookd.core.signing import verify
from hookd.postgres import registry
from tests.cli import Cli
from tests.conftest import run_sql
from tests.daemon.test_api import Client
from tests.producing import add_endpoint_with_id, fetch, send, wait_empty, wait_for_row
from tests.receiver import Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess
    from tests.receiver import Call

pytestmark = pytest.mark.usefixtures("one_server")

SOON = json.dumps(["500ms"] * 90)

REQUIRED: dict[str, Any] = {"HOOKD_SECURITY__REQUIRE_VERIFICATION": "true"}


@pytest.fixture
def cli(dsn: str, tmp_path: Path) -> Cli:
    return Cli(dsn, tmp_path)


class Willing:
    """Answers challenges while it is told to, and everything else with 200."""

    def __init__(self, *, willing: bool) -> None:
        self.willing = willing

    async def __call__(self, call: Call, writer: asyncio.StreamWriter) -> None:
        challenge = challenge_in(call.body)
        if challenge is None:
            writer.write(answer(200))
        elif self.willing:
            writer.write(answer(200, json.dumps({"challenge": challenge}).encode()))
        else:
            writer.write(answer(404))


def events(receiver: Receiver) -> list[str]:
    """What it got beside challenges."""
    return [c.event_id for c in receiver.calls if challenge_in(c.body) is None]


async def in_thread(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return await asyncio.to_thread(call, *arguments, **named)


def test_a_receiver_that_answers_is_verified_at_once(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(**REQUIRED)

    async def go() -> None:
        async with Receiver(Willing(willing=True)) as receiver:
            (made,) = await in_thread(
                cli.json, "endpoint", "add", receiver.url, "--header", "authorization:Bearer x", **REQUIRED
            )
            assert (made["verified"], made["state"]) == (True, "active")
            assert made["verified_at"] is not None
            call = receiver.calls[0]
            assert json.loads(call.body)["type"] == TYPE
            assert call.headers["authorization"] == "Bearer x"
            assert verify(
                made["secret"], call.headers, call.body, int(call.headers["webhook-timestamp"])
            ).valid
            sent = await send(dsn)
            await wait_empty(dsn)
            assert events(receiver) == [sent]
            # asked again it gets another challenge
            text = await in_thread(cli.ok, "endpoint", "verify", made["id"])
            assert text == "verified: it answered the challenge\n"
            first, second = (challenge_in(c.body) for c in receiver.calls if challenge_in(c.body))
            assert first != second

    asyncio.run(go())


def test_one_that_does_not_answer_receives_nothing_until_it_does(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(**REQUIRED)

    async def go() -> None:
        willing = Willing(willing=False)
        async with Receiver(willing) as receiver, Receiver(Willing(willing=True)) as other:
            done = await in_thread(cli, "endpoint", "add", receiver.url, "--json", **REQUIRED)
            assert done.returncode == 1
            made = json.loads(done.stdout)
            assert (made["verified"], made["state"]) == (False, "unverified")
            assert "answered 404" in made["reason"]
            assert made["secret"].startswith("whsec_")
            await in_thread(cli.json, "endpoint", "add", other.url, **REQUIRED)
            sent = [await send(dsn) for _ in range(3)]
            await other.wait_for_calls(4)
            (why,) = [w for w in await in_thread(cli.json, "explain", sent[0]) if w["state"] != "delivered"]
            assert why["state"] == "pending"
            assert "its endpoint is not verified" in why["because"]
            assert f"hookd endpoint verify {made['id']}" in why["because"]
            refused = await in_thread(cli.fails, 1, "endpoint", "test", made["id"])
            assert "before it is verified" in refused
            text = (await in_thread(cli, "endpoint", "verify", made["id"])).stdout
            assert text.startswith("not verified: the challenge was not answered: answered 404")
            assert "1 unverified" in await in_thread(cli.ok, "status")
            # neither by the back door
            for verb in ("pause", "resume"):
                await in_thread(cli, "endpoint", verb, made["id"], **REQUIRED)
            (shown,) = await in_thread(cli.json, "endpoint", "show", made["id"])
            assert shown["state"] == "unverified"
            assert events(receiver) == []
            willing.willing = True
            await in_thread(cli.ok, "endpoint", "verify", made["id"])
            await wait_empty(dsn)
            assert sorted(events(receiver)) == sorted(sent)

    asyncio.run(go())


def test_what_comes_meanwhile_is_skipped_where_that_is_wanted(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_SECURITY__UNVERIFIED="skip", **REQUIRED)

    async def go() -> None:
        willing = Willing(willing=False)
        async with Receiver(willing) as receiver:
            made = json.loads(
                (await in_thread(cli, "endpoint", "add", receiver.url, "--json", **REQUIRED)).stdout
            )
            await send(dsn)
            assert await fetch(dsn, "select from hookd.delivery") == []
            willing.willing = True
            await in_thread(cli.ok, "endpoint", "verify", made["id"])
            sent = await send(dsn)
            await wait_empty(dsn)
            assert events(receiver) == [sent]

    asyncio.run(go())


def test_what_becomes_of_them_can_be_changed_on_the_way(
    dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    (tmp_path / "config.toml").write_text('[security]\nunverified = "wait"\n')
    daemon = start_daemon()
    (tmp_path / "config.toml").write_text('[security]\nunverified = "skip"\n')
    daemon.signal(signal.SIGHUP)
    asyncio.run(
        wait_for_row(dsn, "select from hookd.setting where name = 'security.unverified' and value = 'skip'")
    )


def test_a_new_url_has_to_answer_for_itself(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(**REQUIRED)

    async def go() -> None:
        async with Receiver(Willing(willing=True)) as mine, Receiver(Willing(willing=False)) as victim:
            (made,) = await in_thread(cli.json, "endpoint", "add", mine.url, **REQUIRED)
            done = await in_thread(
                cli, "endpoint", "update", made["id"], "--url", victim.url, "--json", **REQUIRED
            )
            assert done.returncode == 1
            assert json.loads(done.stdout)["state"] == "unverified"
            await send(dsn)
            # a paused one neither: it is asked when it is resumed
            (other,) = await in_thread(cli.json, "endpoint", "add", mine.url, **REQUIRED)
            await in_thread(cli.ok, "endpoint", "pause", other["id"])
            await in_thread(cli.ok, "endpoint", "update", other["id"], "--url", victim.url, **REQUIRED)
            done = await in_thread(cli, "endpoint", "resume", other["id"], "--json", **REQUIRED)
            assert (done.returncode, json.loads(done.stdout)["state"]) == (1, "unverified")
            # the same URL again is no new one
            (kept,) = await in_thread(cli.json, "endpoint", "add", mine.url, **REQUIRED)
            (kept,) = await in_thread(
                cli.json, "endpoint", "update", kept["id"], "--url", mine.url, **REQUIRED
            )
            assert kept["state"] == "active"
            assert events(victim) == []

    asyncio.run(go())


def test_a_disabled_one_is_asked_again_before_it_gets_what_it_missed(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(**REQUIRED)

    async def go() -> None:
        willing = Willing(willing=True)
        async with Receiver(willing) as receiver:
            (made,) = await in_thread(cli.json, "endpoint", "add", receiver.url, **REQUIRED)
            await fetch(
                dsn, "update hookd.endpoint set state = 'disabled' where id = $1::text::uuid", made["id"]
            )
            missed = await send(dsn)
            willing.willing = False
            resume = ("endpoint", "resume", made["id"], "--missed", "all", "--json")
            done = await in_thread(cli, *resume, **REQUIRED)
            assert (done.returncode, json.loads(done.stdout)["state"]) == (1, "unverified")
            assert events(receiver) == []
            willing.willing = True
            await in_thread(cli.ok, "endpoint", "verify", made["id"])
            await wait_empty(dsn)
            assert events(receiver) == [missed]

    asyncio.run(go())


async def fail_for_days(dsn: str) -> None:
    """The endpoint was verified three days ago, and has failed for two."""
    await fetch(
        dsn,
        """update hookd.endpoint
              set verified_at = now() - interval '3 days', failing_since = now() - interval '2 days',
                  failing_reason = 'answered 500', updated_at = now()""",
    )


def test_one_that_has_failed_for_long_is_asked_again_before_the_flood_goes(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = start_daemon(HOOKD_RETRY__SCHEDULE=SOON, **REQUIRED)

    async def go() -> None:
        willing = Willing(willing=True)
        async with Receiver(willing) as receiver:
            _, endpoint_id = await add_endpoint_with_id(dsn, receiver.url)
            await fetch(dsn, "update hookd.endpoint set state = 'paused'")
            sent = [await send(dsn) for _ in range(20)]
            await fail_for_days(dsn)
            # somebody else has the address now: whatever comes is welcome there
            receiver.handle = always(answer(200))
            await fetch(dsn, "update hookd.endpoint set state = 'active'")
            reason = "asked again after failing for long: answered 200 without repeating the challenge"
            await wait_for_row(
                dsn,
                "select 1 from hookd.attempt where outcome = 'unverified' and verdict = 'retry' and starts_with(reason, $1)",
                reason,
            )
            assert events(receiver) == []
            # and now it is the one that wants them
            receiver.handle = willing
            await wait_empty(dsn)
            assert sorted(events(receiver)) == sorted(sent)
            answered = daemon.wait_for("endpoint answered its challenge after failing for long")
            assert answered["endpoint_id"] == str(endpoint_id)
            await wait_for_row(
                dsn,
                """select 1 from hookd.endpoint
                    where verified_at > now() - interval '1 hour' and failing_since is null and state = 'active'""",
            )

    asyncio.run(go())


def test_resuming_one_that_has_failed_for_long_does_not_spare_it(dsn: str) -> None:
    async def go() -> None:
        _, endpoint_id = await add_endpoint_with_id(dsn, "http://127.0.0.1:9017/")
        connection = await asyncpg.connect(dsn)
        await fail_for_days(dsn)
        for after_s, state in ((3 * 86400.0, "active"), (86400.0, "unverified"), (None, "active")):
            await fail_for_days(dsn)
            record, _ = await registry.resume(connection, endpoint_id, ask_again_after_s=after_s)
            assert record.state == state
        # an answer begins its health anew, or its next failure would be the end of five days of them
        await fail_for_days(dsn)
        await registry.resume(connection, endpoint_id, ask_again_after_s=86400.0)
        record = await registry.note_verification(connection, endpoint_id, "http://127.0.0.1:9017/", None)
        assert (record.state, record.failing_since, record.parked_at) == ("active", None, None)
        # of one that is active it is only noted
        await fail_for_days(dsn)
        record = await registry.note_verification(connection, endpoint_id, "http://127.0.0.1:9017/", None)
        assert record.failing_since is not None
        await connection.close()

    asyncio.run(go())


def test_who_vouches_again_for_one_that_failed_for_long_spares_it_the_challenge(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE=SOON, **REQUIRED)

    async def go() -> None:
        async with Receiver() as receiver:
            _, endpoint_id = await add_endpoint_with_id(dsn, receiver.url)
            await fail_for_days(dsn)
            sent = await send(dsn)
            await wait_for_row(dsn, "select 1 from hookd.attempt where outcome = 'unverified'")
            assert events(receiver) == []
            await in_thread(cli.ok, "endpoint", "verify", str(endpoint_id), "--trust")
            await wait_empty(dsn)
            assert events(receiver) == [sent]

    asyncio.run(go())


@pytest.mark.parametrize("state", ["unverified", "paused", "disabled"])
def test_a_test_is_no_way_round_the_challenge(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess], state: str
) -> None:
    """Its body and headers are whatever somebody wants a stranger's server to get, as often as they want."""
    api = Client(start_daemon(**REQUIRED).admin)

    async def go() -> None:
        async with Receiver(Willing(willing=False)) as receiver:
            _, made = await in_thread(api, "POST", "/endpoints", {"url": receiver.url})
            await in_thread(
                run_sql, dsn, f"update hookd.endpoint set state = '{state}' where id = '{made['id']}'"
            )
            path = f"/endpoints/{made['id']}/test"
            status, said = await in_thread(api, "POST", path, {"type": "a.b", "data": {}})
            assert (status, "before it is verified" in said["detail"]) == (409, True), said
            refused = await in_thread(cli, "endpoint", "test", made["id"], **REQUIRED)
            assert (refused.returncode, "before it is verified" in refused.stderr) == (1, True)
            assert events(receiver) == []

    asyncio.run(go())


def test_an_operator_may_vouch_for_it(cli: Cli) -> None:
    done = cli("endpoint", "add", "http://127.0.0.1:9017/", "--json", **REQUIRED)
    made = json.loads(done.stdout)
    assert made["state"] == "unverified"
    cli.ok("endpoint", "verify", made["id"], "--trust")
    assert cli.json("endpoint", "show", made["id"])[0]["state"] == "active"
    # where it is not required any more, resuming is enough
    made = json.loads(cli("endpoint", "add", "http://127.0.0.1:9017/", "--json", **REQUIRED).stdout)
    assert cli.json("endpoint", "resume", made["id"])[0]["state"] == "active"


def test_without_the_requirement_nobody_is_asked(cli: Cli) -> None:
    async def go() -> None:
        async with Receiver() as receiver:
            (made,) = await in_thread(cli.json, "endpoint", "add", receiver.url)
            assert (made["state"], made["verified_at"]) == ("active", None)
            assert receiver.calls == []
            # an answer that says nothing changes nothing for one that is active
            await in_thread(cli, "endpoint", "verify", made["id"])
            assert (await in_thread(cli.json, "endpoint", "show", made["id"]))[0]["state"] == "active"

    asyncio.run(go())


def test_the_api_asks_and_says_what_came_of_it(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    api = Client(start_daemon(**REQUIRED).admin)

    async def go() -> None:
        willing = Willing(willing=False)
        async with Receiver(willing) as receiver:
            status, made = await in_thread(
                api, "POST", "/endpoints", {"url": receiver.url, "key_type": "ed25519"}
            )
            assert (status, made["state"]) == (201, "unverified")
            assert made["verification"]["verified"] is False
            assert "answered 404" in made["verification"]["reason"]
            assert made["public_keys"][0].startswith("whpk_")
            path = f"/endpoints/{made['id']}"
            status, again = await in_thread(api, "POST", f"{path}/verify")
            assert (status, again["verification"]["verified"], again["state"]) == (200, False, "unverified")
            sent = await send(dsn)
            willing.willing = True
            status, again = await in_thread(api, "POST", f"{path}/verify")
            assert (again["verification"], again["state"]) == ({"verified": True, "reason": None}, "active")
            await wait_empty(dsn)
            assert events(receiver) == [sent]
            call = receiver.calls[-1]
            checked = verify(
                made["public_keys"][0], call.headers, call.body, int(call.headers["webhook-timestamp"])
            )
            assert checked.valid
            willing.willing = False
            status, moved = await in_thread(api, "PATCH", path, {"url": receiver.url + "/elsewhere"})
            assert (status, moved["state"]) == (200, "unverified")
            assert moved["verification"]["verified"] is False
            status, refused = await in_thread(
                api, "POST", "/endpoints", {"url": receiver.url, "secret": "hunter2"}
            )
            assert (status, refused["code"]) == (422, "secret")
            assert "hunter2" not in refused["detail"]

    asyncio.run(go())


@pytest.mark.parametrize("echo", ["whole", "inside"])
def test_an_echo_service_is_not_enlisted(cli: Cli, echo: str) -> None:
    async def reflect(call: Call, writer: asyncio.StreamWriter) -> None:
        body = call.body if echo == "whole" else json.dumps({"data": call.body.decode()}).encode()
        writer.write(answer(200, body))

    async def go() -> None:
        async with Receiver(reflect) as victim:
            done = await in_thread(cli, "endpoint", "add", victim.url, **REQUIRED)
            assert done.returncode == 1
            assert "repeats the whole request" in done.stdout

    asyncio.run(go())


def test_hookd_listen_answers_challenges(cli: Cli) -> None:
    from hookd.net import receiver as listening

    async def go() -> None:
        received: list[listening.Received] = []
        receiver = listening.Receiver(
            listening.Manners(), [], received.append, wall=lambda: 0.0, draw=lambda: 0.5
        )
        port = await receiver.start(0)
        try:
            (made,) = await in_thread(cli.json, "endpoint", "add", f"http://127.0.0.1:{port}/", **REQUIRED)
            assert made["verified"] is True
            assert [challenge_in(r.body) is not None for r in received] == [True]
        finally:
            await receiver.stop()

    asyncio.run(go())
