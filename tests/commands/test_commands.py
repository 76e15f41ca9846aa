"""The command line, as real processes: what people type, what is printed, the exit status."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from hookd.postgres.connect import Database
from tests.cli import Cli
from tests.producing import add_endpoint_with_id, fetch, send, wait_empty
from tests.receiver import Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess

NOBODY = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
def cli(dsn: str, tmp_path: Path) -> Cli:
    return Cli(dsn, tmp_path)


@pytest.fixture
def no_database(tmp_path: Path) -> Cli:
    """For what needs none."""
    return Cli("postgresql://nobody@127.0.0.1:1/none", tmp_path)


def test_the_uri_of_the_database_is_one_that_others_understand(server_dsn: str, no_database: Cli) -> None:
    assert no_database.ok("dsn").strip() == no_database.dsn
    known = conninfo_to_dict(server_dsn)
    arguments = {
        "host": known["host"], "port": known["port"], "user": known["user"], "password": known.get("password", ""),
        "database": known["dbname"],
    }  # fmt: skip
    uri = Database(arguments, "the embedded server").uri()
    with psycopg.connect(uri) as connection:
        row = connection.execute("select current_user").fetchone()
    assert row == (known["user"],)


def test_help_is_quick_and_complete(no_database: Cli) -> None:
    text = no_database.ok("--help")
    for command in (
        "run",
        "send",
        "endpoint",
        "replay",
        "explain",
        "top",
        "doctor",
        "secrets",
        "listen",
        "demo",
    ):
        assert f"  {command} " in text
        assert "Usage:" in no_database.ok(command, "--help")
    for verb in (
        "add",
        "list",
        "show",
        "update",
        "pause",
        "resume",
        "remove",
        "rotate",
        "verify",
        "test",
        "check",
    ):
        assert "Usage:" in no_database.ok("endpoint", verb, "--help")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["snd"], 2, "Did you mean one of: 'dsn', 'resend', 'send'?"),
        (["send"], 2, "Missing argument"),
        (["send", "a", "--dta", "x"], 2, "--data"),
        (["send", "a"], 1, "nobody@127.0.0.1:1"),
        (["endpoint", "show", "x"], 2, "'x' is no endpoint id"),
        (["event", "list", "--since", "yesterday"], 2, "write 2h (ago)"),
        (["send", "a", "--header", "Host: x"], 2, "set by hookd"),
        (["send", "a", "--data", "@missing.json"], 1, "missing.json cannot be read"),
        (["replay"], 2, "say what to replay"),
        (["status", "--config", "missing.toml"], 2, "missing.toml: cannot be read"),
    ],
)
def test_errors_are_one_line(no_database: Cli, arguments: list[str], status: int, said: str) -> None:
    error = no_database.fails(status, *arguments)
    assert said in error
    assert len(error.strip().splitlines()) == 1, error


def test_a_wrong_configuration_is_status_2(no_database: Cli) -> None:
    (no_database.folder / "config.toml").write_text('[delivery]\ntimeot = "1s"\n[lg]\n')
    for command in (["check-config"], ["run"], ["status"]):
        error = no_database.fails(2, *command)
        assert "config.toml:2: delivery.timeot: there is no such key; did you mean delivery.timeout?" in error
        assert "config.toml:3: lg: there is no such section; did you mean log?" in error


def test_check_config_and_config_show(no_database: Cli) -> None:
    (no_database.folder / "config.toml").write_text('[delivery]\ntimeout = "1s"\n')
    assert no_database.ok("check-config").strip() == "config.toml: ok"
    shown = no_database.ok("config", "show", HOOKD_DATABASE__DSN="postgresql://me:hidden@h/db")
    assert "delivery.timeout" in shown
    assert "(config.toml:2)" in shown
    assert "hidden" not in shown
    assert "$defs" in json.loads(no_database.ok("config", "schema"))
    assert "_HOOKD_COMPLETE" in no_database.ok("completion", "bash")


def test_migrate(empty_dsn: str, tmp_path: Path) -> None:
    cli = Cli(empty_dsn, tmp_path)
    assert "pending  0001 tables" in cli.ok("migrate", "--dry-run")
    assert "create table hookd.event" in cli.ok("migrate", "--sql")
    assert "applied  0001 tables" in cli.ok("migrate")
    assert cli.ok("migrate").strip() == "the schema is up to date"
    asyncio.run(
        fetch(empty_dsn, "insert into hookd.migration (version, name, checksum) values (99, 'x', 'x')")
    )
    for command in ("migrate", "run", "status"):
        assert "newer than this hookd" in cli.fails(1, command)


def test_without_migrate_the_command_says_so(empty_dsn: str, tmp_path: Path) -> None:
    cli = Cli(empty_dsn, tmp_path)
    assert "run hookd migrate" in cli.fails(1, "run", HOOKD_DATABASE__MIGRATE="false")


def test_send(cli: Cli) -> None:
    first = cli.ok("send", "user.created", "--data", '{"id": 1}', "--key", "k").strip()
    assert cli.ok("send", "user.created", "--data", "{}", "--key", "k").strip() == first
    (cli.folder / "p.json").write_text('{"from":  "file"}')
    from_file = cli.ok("send", "a", "--data", "@p.json", "--tenant", "acme").strip()
    from_stdin = cli.ok("send", "a", "--data", "-", stdin="[1]").strip()
    shown = {e["id"]: e for e in (cli.json("event", "show", i)[0] for i in (first, from_file, from_stdin))}
    assert shown[from_file]["payload"] == '{"from":  "file"}'
    assert shown[from_file]["tenant"] == "acme"
    assert shown[from_stdin]["payload"] == "[1]"
    error = cli.fails(1, "send", "a", "--data", "hello")
    assert error.startswith("hookd: the payload of an event must be JSON")
    assert [e["type"] for e in cli.json("event", "list", "--type", "user.*")] == ["user.created"]


def test_endpoints(cli: Cli) -> None:
    (added,) = cli.json(
        "endpoint", "add", "http://127.0.0.1:9001/x", "--type", "user.*", "--rate", "5", "--header", "X-A: b"
    )
    assert added["secret"].startswith("whsec_")
    assert added["types"] == ["user.*"]
    assert added["header_names"] == ["X-A"]
    assert "b" not in str(added["header_names"])
    identity = added["id"]
    shown = cli.ok("endpoint", "show", identity)
    assert "whsec_" not in shown
    (changed,) = cli.json(
        "endpoint", "update", identity, "--rate", "7", "--clear", "headers", "--ordered", "--type", "*"
    )
    assert (changed["rate"], changed["header_names"], changed["ordered"], changed["types"]) == (
        7.0,
        None,
        True,
        ["*"],
    )
    (changed,) = cli.json("endpoint", "update", identity, "--clear", "rate")
    assert changed["rate"] is None
    assert cli.json("endpoint", "pause", identity)[0]["state"] == "paused"
    assert cli.json("endpoint", "resume", identity)[0]["state"] == "active"
    (rotated,) = cli.json("endpoint", "rotate", identity)
    assert rotated["secret"] not in (None, added["secret"])
    assert rotated["secrets"] == 2
    assert [e["id"] for e in cli.json("endpoint", "list")] == [identity]
    assert cli.json("endpoint", "remove", identity)[0]["state"] == "removed"
    assert cli.json("endpoint", "list") == []
    assert cli.json("endpoint", "list", "--state", "removed")[0]["id"] == identity
    assert "there is no endpoint" in cli.fails(1, "endpoint", "show", NOBODY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://10.0.0.1/"], "the address is not allowed"),
        (["http://169.254.169.254/latest"], "the address is not allowed"),
        (["ftp://example.com/"], "only https and http"),
        (["example.com/hook"], "write https://host/path"),
        (["https://user:pw@example.com/"], "user name or password"),
        (["http://127.0.0.1:9001/", "--filter", "$$.x ?"], "no SQL/JSON path"),
        (["http://127.0.0.1:9001/", "--type", "a b"], "no event type pattern"),
    ],
)
def test_endpoints_that_are_refused(cli: Cli, arguments: list[str], said: str) -> None:
    assert said in cli.fails(1, "endpoint", "add", *arguments)


def test_the_beginning_of_an_id_is_enough_for_the_trail(cli: Cli) -> None:
    (made,) = cli.json("endpoint", "add", "http://127.0.0.1:9000/")
    cli.ok("endpoint", "pause", made["id"])
    paused, added = cli.json("audit", "--endpoint", made["id"][:13])
    assert (paused["action"], added["action"]) == ("endpoint.pause", "endpoint.add")
    assert "is no event id" in cli.fails(2, "audit", "--event", "yesterday")


def test_endpoint_check(no_database: Cli) -> None:
    assert no_database.ok("endpoint", "check", "http://127.0.0.1:9001/").startswith("allowed:")
    done = no_database("endpoint", "check", "http://10.0.0.1/")
    assert (done.returncode, done.stdout.startswith("refused: ")) == (1, True)


def test_endpoint_test_prints_the_exchange(cli: Cli) -> None:
    async def go() -> None:
        async with Receiver(always(answer(200, b"thanks", x_by="me"))) as receiver:
            _, endpoint = await add_endpoint_with_id(
                cli.dsn, receiver.url, headers={"authorization": "Bearer hidden"}
            )
            said = await asyncio.to_thread(cli.ok, "endpoint", "test", str(endpoint))
            assert "> POST /hook HTTP/1.1" in said
            assert "< 200" in said
            assert "< x-by: me" in said
            assert "accepted" in said
            assert "hidden" not in said
            assert receiver.calls[0].headers["authorization"] == "Bearer hidden"
            receiver.handle = always(answer(500))
            done = await asyncio.to_thread(cli, "endpoint", "test", str(endpoint))
            assert done.returncode == 1
            assert "not accepted: answered 500" in done.stdout

    asyncio.run(go())


def test_what_happened(cli: Cli, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE="[]")

    async def go() -> None:
        async with Receiver(always(answer(503, b"busy"))) as receiver:
            _, endpoint = await add_endpoint_with_id(cli.dsn, receiver.url)
            event = await send(cli.dsn)
            await wait_empty(cli.dsn)

            def look() -> None:
                (explained,) = cli.json("explain", event)
                assert explained["state"] == "exhausted"
                assert "given up" in explained["because"]
                assert "given up" in cli.ok("explain", str(explained["delivery_id"]))
                assert "no delivery 1234567;" in cli.fails(1, "explain", "1234567")
                assert "'²' is no event id" in cli.fails(2, "explain", "²")
                (attempt,) = cli.json("attempts", "--endpoint", str(endpoint))
                assert (attempt["status"], attempt["answer_body"]) == (503, "busy")
                assert "busy" in cli.ok("attempts", "--event", event, "--full")
                assert "503" in cli.ok("attempts")
                assert "exhausted" in cli.ok("event", "show", event)
                (status,) = cli.json("status")
                assert status["queue"]["dead_letters"] == 1
                assert status["daemons"][0]["shards"] == 64
                assert "1 dead letter" in cli.ok("status")
                assert cli.json("replay", "--state", "exhausted", "--dry-run")[0] == {
                    "matching": 1,
                    "queued": 0,
                    "states": {"exhausted": 1},
                    "endpoints": 1,
                    "of_disabled_endpoints": 0,
                }
                assert cli.json("replay", "--state", "exhausted")[0]["queued"] == 1

            (first,) = await asyncio.to_thread(cli.json, "explain", event)
            await asyncio.to_thread(look)
            await wait_empty(cli.dsn)
            replayed = await asyncio.to_thread(cli.fails, 1, "explain", str(first["delivery_id"]))
            assert f"was followed by a newer one; run: hookd explain {event}" in replayed
            receiver.handle = always(answer(200))
            await asyncio.to_thread(cli.ok, "resend", event)
            await wait_empty(cli.dsn)
            assert "delivered at" in await asyncio.to_thread(cli.ok, "explain", event)
            assert receiver.calls[-1].event_id == event

    asyncio.run(go())


def test_explain_says_what_a_pending_one_waits_for(
    cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    async def go() -> None:
        async with Receiver() as receiver:
            _, endpoint = await add_endpoint_with_id(cli.dsn, receiver.url)
            event = await send(cli.dsn)
            assert "is `hookd run` running?" in await asyncio.to_thread(cli.ok, "explain", event)
            await fetch(cli.dsn, "update hookd.endpoint set state = 'paused' where id = $1", endpoint)
            assert "its endpoint is paused" in await asyncio.to_thread(cli.ok, "explain", event)
            await asyncio.to_thread(start_daemon, HOOKD_LIMITS__RATE="0.01", HOOKD_LIMITS__BURST="1")
            await fetch(cli.dsn, "update hookd.endpoint set state = 'active' where id = $1", endpoint)
            await wait_empty(cli.dsn)
            waiting = await send(cli.dsn)
            async with asyncio.timeout(20):
                while "rate limit" not in (said := await asyncio.to_thread(cli.ok, "explain", waiting)):
                    await asyncio.sleep(0.1)
            assert "it waits for its host's rate limit (0.01/s)" in said

    asyncio.run(go())


def test_verify(no_database: Cli) -> None:
    from hookd.core.signing import new_secret, parse_secret, sign

    secret = new_secret(b"k" * 32).reveal()
    now = int(time.time())
    signature = sign([parse_secret(secret)], "1", now, b'{"a":1}')
    captured = (
        f"POST / HTTP/1.1\nwebhook-id: 1\nwebhook-timestamp: {now}\nwebhook-signature: {signature}\n\n"
        '{"a":1}'
    )
    assert no_database.ok("verify", "--secret", secret, stdin=captured).strip() == "the signature is right"
    assert no_database.ok("verify", stdin=captured + "\n", HOOKD_SECRET=secret)
    done = no_database("verify", "--secret", secret, stdin=captured.replace('{"a":1}', '{"a": 1}'))
    assert done.returncode == 1
    assert "byte for byte" in done.stdout


def test_doctor(cli: Cli, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon()
    said = cli.ok("doctor")
    assert "ok    schema" in said
    assert "warn  network.allow" in said
    assert "ok    daemons" in said
    broken = cli("doctor", HOOKD_DATABASE__DSN="postgresql://nobody@127.0.0.1:1/none")
    assert broken.returncode == 1
    assert "fail  database" in broken.stdout


def test_listen(no_database: Cli) -> None:
    from hookd.core.signing import new_secret, parse_secret, sign

    secret = new_secret(b"k" * 32).reveal()
    process = subprocess.Popen(
        [sys.executable, "-m", "hookd", "listen", "--port", "0", "--secret", secret, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=no_database.folder,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stdout is not None
    port = int(process.stderr.readline().split(":")[2].split("/")[0])

    async def call(body: bytes, signed: bytes) -> bytes:
        now = int(time.time())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: {len(body)}\r\nwebhook-id: 1\r\nwebhook-timestamp: {now}\r\n"
        head += f"webhook-signature: {sign([parse_secret(secret)], '1', now, signed)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        got = await reader.read()
        writer.close()
        return got

    good = asyncio.run(call(b"{}", b"{}"))
    bad = asyncio.run(call(b"{}", b"{ }"))
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert good.startswith(b"HTTP/1.1 200")
    assert bad.startswith(b"HTTP/1.1 401")
    assert [json.loads(line)["signed"] for line in out.splitlines()] == [True, False]
