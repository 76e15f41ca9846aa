"""Secrets at rest: what the database holds, what the daemon does with it, and what happens without the key."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookd.core.sealing import Keyring
from hookd.core.signing import verify
from hookd.keyfile import add_key, read_keyring
from hookd.postgres import vault
from tests.cli import Cli
from tests.daemon_process import wait_until
from tests.producing import add_endpoint_with_id, fetch, send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

BEARER = "Bearer planted-in-a-header"


@pytest.fixture
def cli(dsn: str, tmp_path: Path) -> Cli:
    return Cli(dsn, tmp_path)


@pytest.fixture
def keyfile(tmp_path: Path) -> str:
    path = str(tmp_path / "master.key")
    add_key(path, b"1" * 32)
    return path


def stored(dsn: str) -> list[str]:
    return [
        r["value"] for r in asyncio.run(fetch(dsn, "select value from hookd.endpoint_secret order by id"))
    ]


def test_the_database_holds_nothing_that_signs(dsn: str, cli: Cli, keyfile: str) -> None:
    with_key: dict[str, Any] = {"HOOKD_SECURITY__MASTER_KEY_FILE": keyfile}
    (made,) = cli.json(
        "endpoint", "add", "http://127.0.0.1:9000/", "--header", f"authorization:{BEARER}", **with_key
    )
    (rotated,) = cli.json("endpoint", "rotate", made["id"], "--key-type", "ed25519", **with_key)
    cli.ok("endpoint", "update", made["id"], "--header", f"x-other:{BEARER}", **with_key)
    values = stored(dsn)
    assert len(values) == 3
    newest = read_keyring(keyfile).newest
    assert all(v.startswith(f"enc:v1:{newest}:") for v in values)
    for secret in (made["secret"], rotated["secret"], BEARER):
        assert not any(secret[8:20] in v for v in values)
    (shown,) = cli.json("endpoint", "show", made["id"], **with_key)
    assert shown["header_names"] == ["x-other"]
    assert shown["public_keys"] == [rotated["public_key"]]
    assert (shown["secrets"], shown["key_type"]) == (2, "ed25519")


def test_a_row_moved_to_another_endpoint_does_not_sign_there(dsn: str, keyfile: str) -> None:
    ring = read_keyring(keyfile)

    async def go() -> None:
        _, first = await add_endpoint_with_id(dsn, "http://127.0.0.1:9001/", keyring=ring)
        _, second = await add_endpoint_with_id(dsn, "http://127.0.0.1:9002/", keyring=ring)
        await fetch(
            dsn,
            """update hookd.endpoint_secret s set value = o.value
                 from hookd.endpoint_secret o, hookd.endpoint e, hookd.endpoint f
                where s.endpoint = e.key and e.id = $1 and o.endpoint = f.key and f.id = $2""",
            second,
            first,
        )
        connection = await asyncpg.connect(dsn)
        from hookd.core.model import EndpointState
        from hookd.postgres.queue import Queue

        queue = Queue(connection, lambda: ring)
        read = {e.id: e for e in await queue.endpoints_of(range(64))}
        assert len(read[first].secrets) == 1
        assert read[first].state is EndpointState.ACTIVE
        assert read[second].secrets == ()
        assert read[second].state is EndpointState.PAUSED
        assert "another endpoint's" in queue.unreadable[second]
        await connection.close()

    asyncio.run(go())


def test_secrets_rotate_under_a_daemon_that_delivers(
    dsn: str, cli: Cli, keyfile: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """From plain text to the first key to the second, with signatures that hold all the way."""
    with_key: dict[str, Any] = {"HOOKD_SECURITY__MASTER_KEY_FILE": keyfile}
    daemon = start_daemon(**with_key)

    async def _deliver(secret: str, receiver: Receiver) -> None:
        await send(dsn)
        await wait_empty(dsn)
        call = receiver.calls[-1]
        assert call.headers["authorization"] == BEARER
        assert verify(secret, call.headers, call.body, int(call.headers["webhook-timestamp"])).valid

    async def go() -> None:
        loop = asyncio.get_running_loop()
        async with Receiver() as receiver:
            secret, endpoint = await add_endpoint_with_id(
                dsn, receiver.url, headers={"authorization": BEARER}
            )

            def deliver() -> None:
                asyncio.run_coroutine_threadsafe(_deliver(secret, receiver), loop).result(30)

            await asyncio.to_thread(steps, deliver, str(endpoint))

    def steps(deliver: Callable[[], None], endpoint: str) -> None:
        deliver()
        first = read_keyring(keyfile).newest
        (dry,) = cli.json("secrets", "rotate", "--dry-run", **with_key)
        assert (dry["encrypted"], dry["plain"], dry["keys"]) == (0, 2, {})
        (done,) = cli.json("secrets", "rotate", **with_key)
        assert (done["encrypted"], done["plain"], done["keys"]) == (2, 0, {first: 2})
        (made,) = cli.json("secrets", "new-key", keyfile)
        assert made["older"] == [first]
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: bool(daemon.said("master keys changed")), "SIGHUP")
        (done,) = cli.json("secrets", "rotate", **with_key)
        assert (done["encrypted"], done["keys"]) == (2, {made["key"]: 2})
        (again,) = cli.json("secrets", "rotate", **with_key)
        assert again["encrypted"] == 0
        # read anew: what the daemon knew of the endpoint was opened with the first key
        cli.ok("endpoint", "update", endpoint, "--description", "read me", **with_key)
        deliver()
        assert "all 2 are encrypted" in cli("doctor", **with_key).stdout

    asyncio.run(go())


def test_without_its_key_an_endpoint_waits_and_others_do_not(
    dsn: str, cli: Cli, keyfile: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    other = str(tmp_path / "other.key")
    add_key(other, b"2" * 32)
    with_key: dict[str, Any] = {"HOOKD_SECURITY__MASTER_KEY_FILE": keyfile}
    daemon = start_daemon(**with_key)

    async def go() -> None:
        async with Receiver() as receiver:
            locked, endpoint = await add_endpoint_with_id(
                dsn, receiver.url, types=["locked"], keyring=read_keyring(other)
            )
            await add_endpoint_with_id(dsn, receiver.url, types=["open"], keyring=read_keyring(keyfile))
            event = await send(dsn, "locked")
            for _ in range(5):
                await send(dsn, "open")
            await receiver.wait_for_calls(5)
            said = await asyncio.to_thread(daemon.wait_for, "secrets of endpoints cannot be read")
            assert said["endpoint_ids"] == [str(endpoint)]
            assert str(read_keyring(other).newest) in said["reason"]

            def explained() -> bool:
                (why,) = cli.json("explain", event)
                return "cannot read the secrets" in why["because"] and "put it back" in why["because"]

            await asyncio.to_thread(wait_until, explained, "explain says so")
            doctor = await asyncio.to_thread(cli, "doctor", **with_key)
            assert doctor.returncode == 1
            assert "security.master_key_file lacks" in doctor.stdout
            refused = await asyncio.to_thread(cli.fails, 1, "endpoint", "test", str(endpoint), **with_key)
            assert "cannot be read" in refused
            assert len(receiver.calls) == 5

            def put_back() -> None:
                with Path(keyfile).open("a", encoding="utf-8") as file:
                    file.write(Path(other).read_text(encoding="utf-8"))
                daemon.signal(signal.SIGHUP)

            await asyncio.to_thread(put_back)
            await wait_empty(dsn)
            call = receiver.calls[-1]
            assert len(receiver.calls) == 6
            assert verify(locked, call.headers, call.body, int(call.headers["webhook-timestamp"])).valid
            attempts = await fetch(dsn, "select attempt from hookd.attempt where event_id = $1", event)
            assert [a["attempt"] for a in attempts] == [1]

    asyncio.run(go())


def test_a_bad_key_file_changes_nothing_and_is_refused_at_start(
    dsn: str, cli: Cli, keyfile: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    with_key: dict[str, Any] = {"HOOKD_SECURITY__MASTER_KEY_FILE": keyfile}
    daemon = start_daemon(**with_key)
    (tmp_path / "master.key").chmod(0o644)
    daemon.signal(signal.SIGHUP)
    said = daemon.wait_for("configuration not applied")
    assert "chmod 600" in said["mistakes"][0]
    assert "chmod 600" in cli.fails(2, "run", **with_key)
    assert "chmod 600" in cli.fails(2, "check-config", **with_key)
    assert "chmod 600" in cli.fails(2, "endpoint", "add", "http://127.0.0.1:9000/", **with_key)
    assert "chmod 600" in cli("doctor", **with_key).stdout
    assert stored(dsn) == []

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint_with_id(dsn, receiver.url, keyring=Keyring(ring.keys))
            await send(dsn)
            await wait_empty(dsn)

    (tmp_path / "master.key").chmod(0o600)
    ring = read_keyring(keyfile)
    asyncio.run(go())


def test_resealing_can_be_broken_off_and_leaves_what_changed_meanwhile(dsn: str, keyfile: str) -> None:
    ring = read_keyring(keyfile)

    async def go() -> None:
        secrets = {}
        for n in range(7):
            secret, endpoint = await add_endpoint_with_id(dsn, f"http://127.0.0.1:{9000 + n}/")
            secrets[endpoint] = secret
        connection = await asyncpg.connect(dsn)
        async for progress in vault.reseal(connection, ring, 3):
            assert progress.done == 3
            break
        counted = await vault.census(connection)
        assert (counted.plain, counted.by_key) == (4, {ring.newest: 3})
        # between its read and its write another command writes: that stays
        real = connection.fetch

        async def fetch_and_interfere(statement: str, *args: Any) -> Any:
            rows = await real(statement, *args)
            if statement == vault.STALE and rows:
                await connection.execute(
                    "update hookd.endpoint_secret set value = 'whsec_' || repeat('A', 32) where id = $1",
                    rows[0]["id"],
                )
            return rows

        connection_like = _Wrapped(connection, fetch_and_interfere)
        done = [p.done async for p in vault.reseal(connection_like, ring, 100)]  # type: ignore[arg-type]
        assert done == [3]
        assert (await vault.census(connection)).plain == 1
        async for progress in vault.reseal(connection, ring, 100):
            assert progress.unreadable == {}
        rows = await connection.fetch(
            "select e.id, s.value from hookd.endpoint_secret s join hookd.endpoint e on e.key = s.endpoint"
        )
        opened = [vault.unseal(ring, r["id"], "signing", r["value"]) == secrets[r["id"]] for r in rows]
        assert sorted(opened) == [False] + [True] * 6
        await connection.close()

    asyncio.run(go())


class _Wrapped:
    """A session that somebody else gets in between."""

    def __init__(self, connection: Any, fetch: Any) -> None:
        self.fetch = fetch
        self.execute = connection.execute


def test_the_daemon_says_that_secrets_are_plain_text(
    cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = start_daemon()
    assert (
        "security.master_key_file is not set"
        in daemon.wait_for("endpoint secrets are stored as plain text")["event"]
    )
    asyncio.run(add_endpoint_with_id(cli.dsn, "http://127.0.0.1:9001/"))
    assert "1 are stored as plain text" in cli("doctor").stdout
    assert "not set" in cli.fails(2, "secrets", "rotate")
