"""Faults of this machine: no attempt is spent, nobody is blamed, it is said once, and it goes on when they are over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon_process import DaemonProcess
from tests.net.test_namespace import namespace
from tests.net.test_resolver import A, Dns
from tests.producing import add_endpoint, fetch, send, wait_empty, wait_for_row
from tests.receiver import OK, Call, Receiver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = pytest.mark.usefixtures("one_server")

Start = "Callable[..., DaemonProcess]"

MANY = (
    "insert into hookd.event (type, payload, tenant) select 'a', '1', $2 from generate_series(1, $1::integer)"
)

IN_A_NETWORK_OF_ITS_OWN = pytest.mark.skipif(
    sys.platform != "linux" or not namespace(),
    reason="needs Linux, ip and a network namespace (unshare -n as root, or user namespaces)",
)


@pytest.fixture
def dsn(dsn: str) -> str:
    if "host=" not in dsn:
        pytest.skip("PostgreSQL has to be on a Unix socket: another network does not reach it otherwise")
    return dsn


@pytest.fixture
def run_daemon(dsn: str, tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    daemons: list[DaemonProcess] = []

    def start(*prefix: str, **environment: str) -> DaemonProcess:
        # its namespace is entered by way of /proc, where one that keeps its memory private shows nothing
        settings = {"HOOKD_DATABASE__DSN": dsn, "HOOKD_SECURITY__CORE_DUMPS": "true", **environment}
        daemons.append(DaemonProcess(tmp_path, settings, prefix))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.kill()


async def wait_said(daemon: DaemonProcess, event: str) -> dict[str, Any]:
    return await asyncio.to_thread(daemon.wait_for, event, 30)


async def assert_held(dsn: str, daemon: DaemonProcess, problem: str) -> None:
    """It is said and why; ``status`` shows it, and ``explain`` says it of a delivery."""
    said = await wait_said(daemon, "deliveries are held")
    assert problem in said["problem"]
    await wait_for_row(
        dsn, "select 1 from hookd.node where summary -> 'faults' @> to_jsonb($1::text)", said["problem"]
    )
    assert f"holds deliveries back: {said['problem']}" in await ask(dsn, "status")
    # the last one waits longest; between two tries its lane may be trying
    (row,) = await fetch(dsn, "select max(id) as id from hookd.delivery")
    async with asyncio.timeout(30):
        while f"{said['problem']}: nothing goes to its host" not in await ask(dsn, "explain", str(row["id"])):
            await asyncio.sleep(0.1)


async def ask(dsn: str, *arguments: str) -> str:
    """What a command prints, on one line."""
    shown = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "hookd", *arguments],
        env={"HOOKD_DATABASE__DSN": dsn, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return " ".join(shown.stdout.split())


async def assert_nobody_was_blamed(dsn: str, daemon: DaemonProcess, problem: str) -> None:
    rows = await fetch(
        dsn,
        "select outcome, reason, count(*) from hookd.attempt where verdict <> 'delivered' or attempt <> 1 group by 1, 2",
    )
    assert [tuple(r) for r in rows] == []
    rows = await fetch(dsn, "select count(*) from hookd.endpoint where failing_since is not null")
    assert rows[0]["count"] == 0
    assert len([s for s in daemon.said("deliveries are held") if problem in s["problem"]]) == 1
    assert not daemon.said("internal error")
    assert not daemon.said("database lost")


def healthy(daemon: DaemonProcess) -> bool:
    with urllib.request.urlopen(f"{daemon.admin}/healthz", timeout=10) as got:
        return bool(got.status == 200)


@contextlib.asynccontextmanager
async def name_server(port: int) -> AsyncIterator[Dns]:
    loop = asyncio.get_running_loop()
    transport, dns = await loop.create_datagram_endpoint(Dns, local_addr=("127.0.0.1", port))
    dns.records = {("hooks.example", A): ["127.0.0.1"]}
    try:
        yield dns
    finally:
        transport.close()


@pytest.mark.parametrize("how", ["refuses", "is silent"])
def test_dns_is_gone(dsn: str, run_daemon: Callable[..., DaemonProcess], how: str) -> None:
    """Nobody listens at the name server's address, or whoever does says nothing; a neighbour that needs none does not notice."""

    async def go() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
            mute.bind(("127.0.0.1", 0))
            port = mute.getsockname()[1]
            if how == "refuses":
                mute.close()
            daemon = run_daemon(
                HOOKD_NETWORK__NAMESERVERS=json.dumps([f"127.0.0.1:{port}"]),
                HOOKD_DELIVERY__CONNECT_TIMEOUT="3s",
            )
            await asyncio.to_thread(daemon.wait_ready)
            async with Receiver() as named, Receiver() as neighbour:
                await add_endpoint(dsn, named.url.replace("127.0.0.1", "hooks.example"), tenant="named")
                await add_endpoint(dsn, neighbour.url, tenant="neighbour")
                await fetch(dsn, MANY, 300, "named")
                await assert_held(dsn, daemon, "no DNS server answers")
                await send(dsn, tenant="neighbour")
                await neighbour.wait_for_calls(1)
                assert await asyncio.to_thread(healthy, daemon)
                mute.close()
                async with name_server(port):
                    await wait_empty(dsn)
                assert len(named.calls) == 300
            await assert_nobody_was_blamed(dsn, daemon, "no DNS server answers")

    asyncio.run(go())


def test_descriptors_are_few(dsn: str, run_daemon: Callable[..., DaemonProcess]) -> None:
    """100 of them, and 300 receivers that keep their connections open: PostgreSQL, the probes and new sessions find some left."""
    release = asyncio.Event()

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(OK)

    async def go() -> None:
        daemon = run_daemon(
            "sh", "-c", 'ulimit -n 100 && exec "$@"', "sh", HOOKD_LIMITS__CONCURRENCY="0", HOOKD_DELIVERY__MAX_IN_FLIGHT="300"
        )  # fmt: skip
        said = await wait_said(daemon, "fewer file descriptors")
        assert said["descriptors"] == 100
        await asyncio.to_thread(daemon.wait_ready)
        async with contextlib.AsyncExitStack() as stack:
            receivers = [await stack.enter_async_context(Receiver(handle)) for _ in range(60)]
            for receiver in receivers:
                await add_endpoint(dsn, receiver.url)
            await fetch(dsn, MANY, 5, "default")
            async with asyncio.timeout(30):
                while sum(len(r.calls) for r in receivers) < 36:
                    await asyncio.sleep(0.02)
            # all that receivers may have is taken; what PostgreSQL and the probes need is not
            assert await asyncio.to_thread(healthy, daemon)
            await fetch(
                dsn,
                """select pg_terminate_backend(pid) from pg_stat_activity
                    where datname = current_database() and application_name like 'hookd %'""",
            )
            await wait_said(daemon, "database is back")
            release.set()
            await wait_empty(dsn)
            assert sum(len(r.calls) for r in receivers) == 300
        rows = await fetch(dsn, "select count(*) from hookd.attempt where verdict <> 'delivered'")
        assert rows[0]["count"] == 0
        assert not daemon.said("internal error")

    asyncio.run(go())


def entering(daemon: DaemonProcess) -> list[str]:
    """The command that starts another one in the daemon's network; who is not root has to enter its user namespace too."""
    by_user = ["-U", "--preserve-credentials"] if "U" in namespace()[1] else []
    return ["nsenter", "-t", str(daemon.process.pid), "-n", *by_user]


def inside(daemon: DaemonProcess, *command: str) -> None:
    """Run something in the daemon's network."""
    done = subprocess.run([*entering(daemon), *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def listening(
    daemon: DaemonProcess, folder: Path, address: str, port: int, *, hold: bool = False
) -> Iterator[Path]:
    """A receiver in the daemon's network; yields the file that has a line for each request."""
    log = folder / "received"
    script = folder / "listen.py"
    script.write_text(LISTEN)
    running = subprocess.Popen(
        [*entering(daemon), sys.executable, str(script), address, str(port), str(log), str(int(hold))],
        stdin=subprocess.PIPE,
    )
    try:
        yield log
    finally:
        running.kill()
        running.communicate()


LISTEN = """
import asyncio, sys
address, port, log, hold = sys.argv[1], int(sys.argv[2]), open(sys.argv[3], "a", buffering=1), sys.argv[4] == "1"
async def serve(reader, writer):
    while True:
        try:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
        except (asyncio.IncompleteReadError, OSError):
            return
        size = next(int(l.split(b":")[1]) for l in head.lower().split(b"\\r\\n") if l.startswith(b"content-length"))
        await reader.readexactly(size)
        print("1", file=log)
        if hold:
            await asyncio.sleep(1)
        writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")
async def main():
    server = await asyncio.start_server(serve, address, port)
    await server.serve_forever()
asyncio.run(main())
"""


@IN_A_NETWORK_OF_ITS_OWN
def test_there_is_no_route(dsn: str, tmp_path: Path, run_daemon: Callable[..., DaemonProcess]) -> None:
    async def go() -> None:
        daemon = run_daemon(*namespace(), HOOKD_NETWORK__ALLOW='["203.0.113.0/24"]', HOOKD_ADMIN__LISTEN="")
        await asyncio.to_thread(daemon.wait_ready)
        await add_endpoint(dsn, "http://203.0.113.7:8080/hook")
        await fetch(dsn, MANY, 200, "default")
        await assert_held(dsn, daemon, "no route")
        inside(daemon, "ip", "link", "set", "lo", "up")
        inside(daemon, "ip", "route", "add", "local", "203.0.113.0/24", "dev", "lo")
        with listening(daemon, tmp_path, "203.0.113.7", 8080) as log:
            await wait_empty(dsn)
            assert len(log.read_text().splitlines()) == 200
        rows = await fetch(dsn, "select distinct outcome from hookd.attempt where verdict <> 'delivered'")
        # between the route and the receiver there was nobody to connect to
        assert [r["outcome"] for r in rows] in ([], ["connect_refused"])
        assert len(daemon.said("deliveries are held")) == 1
        assert not daemon.said("internal error")

    asyncio.run(go())


@IN_A_NETWORK_OF_ITS_OWN
def test_there_are_no_ports_left(dsn: str, tmp_path: Path, run_daemon: Callable[..., DaemonProcess]) -> None:
    """Twelve local ports for 40 exchanges at once: the lane makes do with what there is."""

    async def go() -> None:
        daemon = run_daemon(*namespace(), HOOKD_NETWORK__ALLOW='["127.0.0.0/8"]', HOOKD_ADMIN__LISTEN="")
        await asyncio.to_thread(daemon.wait_ready)
        inside(daemon, "ip", "link", "set", "lo", "up")
        inside(daemon, "sh", "-c", "echo 20000 20011 > /proc/sys/net/ipv4/ip_local_port_range")
        with listening(daemon, tmp_path, "127.0.0.1", 8080, hold=True) as log:
            inside(daemon, "sh", "-c", "until ss -ltn | grep -q :8080; do sleep 0.05; done")
            await add_endpoint(dsn, "http://127.0.0.1:8080/hook")
            await fetch(dsn, MANY, 40, "default")
            said = await wait_said(daemon, "deliveries are held")
            assert "no local ports left" in said["problem"]
            await wait_empty(dsn)
            assert len(log.read_text().splitlines()) == 40
        await assert_nobody_was_blamed(dsn, daemon, "no local ports left")

    asyncio.run(go())


def test_memory_is_bounded_however_slow_they_are(dsn: str, run_daemon: Callable[..., DaemonProcess]) -> None:
    """Nobody answers: what is in flight and in memory is what docs/operating.md says, the rest stays in PostgreSQL."""
    release = asyncio.Event()

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(OK)

    most, payload, max_response = 1000, 1100, 16 * 1024
    bound_mb = 70 + (most * (7000 + 2 * payload + max_response) + 4 * most * (600 + payload)) / 1e6

    async def go() -> None:
        daemon = run_daemon(
            HOOKD_LIMITS__CONCURRENCY="0",
            HOOKD_DELIVERY__MAX_IN_FLIGHT=str(most),
            HOOKD_DELIVERY__TIMEOUT="1m",
        )
        await asyncio.to_thread(daemon.wait_ready)
        async with contextlib.AsyncExitStack() as stack:
            receivers = [await stack.enter_async_context(Receiver(handle)) for _ in range(20)]
            for receiver in receivers:
                await add_endpoint(dsn, receiver.url)
            await fetch(
                dsn,
                """insert into hookd.event (type, payload)
                   select 'a', '{"n": ' || n || ', "x": "' || repeat('x', 1000) || '"}' from generate_series(1, 5000) n""",
            )
            async with asyncio.timeout(30):
                while sum(len(r.calls) for r in receivers) < 0.9 * most:  # n hosts leave one share free
                    await asyncio.sleep(0.05)
            assert await asyncio.to_thread(healthy, daemon)
            rows = await fetch(dsn, "select count(*) from hookd.delivery")
            assert rows[0]["count"] == 100_000
            assert sum(len(r.calls) for r in receivers) < most
            status = Path(f"/proc/{daemon.process.pid}/status").read_text()
            (peak,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
            assert peak / 1000 < bound_mb, "docs/operating.md"
            release.set()
            async with asyncio.timeout(60):
                while sum(len(r.calls) for r in receivers) < 3 * most:
                    await asyncio.sleep(0.05)

    asyncio.run(go())


def test_everything_times_out(dsn: str, run_daemon: Callable[..., DaemonProcess]) -> None:
    """That cannot be told from receivers that hang: lanes slow down, the probes answer, and who answers is served."""

    async def hang(_call: Call, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async def go() -> None:
        daemon = run_daemon(HOOKD_DELIVERY__TIMEOUT="1s", HOOKD_RETRY__SCHEDULE='["1h"]')
        await asyncio.to_thread(daemon.wait_ready)
        async with contextlib.AsyncExitStack() as stack:
            hanging = [await stack.enter_async_context(Receiver(hang)) for _ in range(40)]
            neighbour = await stack.enter_async_context(Receiver())
            for receiver in hanging:
                await add_endpoint(dsn, receiver.url, tenant="hangs")
            await add_endpoint(dsn, neighbour.url, tenant="neighbour")
            await fetch(dsn, MANY, 100, "hangs")
            await wait_for_row(
                dsn, "select 1 from hookd.attempt where outcome = 'timeout' having count(*) >= 200"
            )
            assert await asyncio.to_thread(healthy, daemon)
            event = await send(dsn, tenant="neighbour")
            await neighbour.wait_for_calls(1)
            assert neighbour.calls[0].event_id == event
            await wait_for_row(
                dsn,
                """select 1 from hookd.node, jsonb_array_elements(summary -> 'lanes') l
                    where (l ->> 'breaker_open')::boolean having count(*) = 40""",
            )
            # what was in flight when a lane opened, and its probes; of 4,000
            assert sum(len(r.calls) for r in hanging) < 40 * 60
            daemon.signal(signal.SIGTERM)
            assert await asyncio.to_thread(daemon.process.wait, 60) == 0

    asyncio.run(go())
