"""A browser, a daemon with its console, and receivers: all of them real."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import pytest

from tests.conftest import run_sql, with_database
from tests.daemon_process import DaemonProcess
from tests.producing import add_endpoint_with_id, send, wait_for_row
from tests.receiver import Receiver, answer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip

TOKEN = "0123456789abcdef0123456789abcdef"

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


class Stage:
    """An event loop in a thread of its own, on which browser, receivers and the test's questions live together."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def __call__(self, work: Coroutine[Any, Any, Any], deadline_s: float = 90.0) -> Any:
        """Run it there, and wait."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(deadline_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class World:
    """One daemon and what it has to show."""

    def __init__(self, dsn: str, daemon: DaemonProcess) -> None:
        self.dsn = dsn
        self.daemon = daemon
        self.url = daemon.admin
        self.good: Any = None
        self.bad: Any = None
        self.delivered = ""
        self.failed = ""
        self._receivers = contextlib.AsyncExitStack()

    async def fill(self) -> Self:
        """Three endpoints that were called, and one that waits."""

        async def refuses(_call: Any, writer: asyncio.StreamWriter) -> None:
            writer.write(answer(500, HOSTILE.encode(), content_type="text/html", x_note=HOSTILE))

        good = await self._receivers.enter_async_context(Receiver())
        bad = await self._receivers.enter_async_context(Receiver(refuses))
        self.receiver = good
        _, self.good = await add_endpoint_with_id(
            self.dsn, good.url, tenant="acme", types=["user.*"], description="CRM"
        )
        _, self.bad = await add_endpoint_with_id(
            self.dsn, bad.url, tenant="acme", types=["order.*"], description=HOSTILE
        )
        self.delivered = await send(
            self.dsn, "user.created", '{"id": 12345678901234567890, "name": "Jo"}', tenant="acme"
        )
        self.failed = await send(self.dsn, "order.paid", f'{{"note": "{HOSTILE}"}}', tenant="acme")
        for event, verdict in ((self.delivered, "delivered"), (self.failed, "exhausted")):
            await wait_for_row(
                self.dsn, "select 1 from hookd.attempt where event_id = $1 and verdict = $2", event, verdict
            )
        return self

    async def counted(self) -> None:
        """The charts are made of what the daemon writes down every ten seconds."""
        await wait_for_row(
            self.dsn, "select 1 from hookd.tally m where (m.figures ->> 'verdict.delivered')::integer > 0"
        )

    async def number(self, event: str) -> int:
        """The newest delivery of an event."""
        row = await wait_for_row(
            self.dsn,
            "select max(delivery_id) as n from hookd.attempt where event_id = $1 having count(*) > 0",
            event,
        )
        return int(row["n"])

    async def close(self) -> None:
        await self._receivers.aclose()


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    found = Stage()
    yield found
    found.close()


@pytest.fixture(scope="module")
def world(
    server_dsn: str, template: str, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A daemon without a token, on loopback, as a developer has it."""
    yield from _world(server_dsn, template, stage, tmp_path_factory.mktemp("console"), fill=True)


@pytest.fixture(scope="module")
def guarded(
    server_dsn: str, template: str, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A daemon with a token."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "token").chmod(0o600)
    yield from _world(
        server_dsn, template, stage, folder,
        HOOKD_ADMIN__TOKEN_FILE=str(folder / "token"), HOOKD_ADMIN__HOSTS='["hookd.example"]',
    )  # fmt: skip


def _world(
    server_dsn: str, template: str, stage: Stage, folder: Path, *, fill: bool = False, **environment: str
) -> Iterator[World]:
    name = f"test_{uuid4().hex[:8]}"
    run_sql(server_dsn, f"create database {name} template {template}")
    dsn = with_database(server_dsn, name)
    daemon = DaemonProcess(folder, {"HOOKD_DATABASE__DSN": dsn, "HOOKD_RETRY__SCHEDULE": "[]", **environment})
    try:
        daemon.wait_ready()
        found = World(dsn, daemon)
        if fill:
            stage(found.fill())
        yield found
        stage(found.close())
    finally:
        daemon.kill()
        run_sql(server_dsn, f"drop database {name} with (force)")


@pytest.fixture(scope="session")
def browser(stage: Stage) -> Iterator[Any]:
    """A headless Chromium with a profile of its own."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed on this machine (Debian: apt install chromium)")
    from playwright.async_api import async_playwright

    async def start() -> tuple[Any, Any]:
        driver = await async_playwright().start()
        return driver, await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

    driver, found = stage(start())
    yield found
    stage(found.close())
    stage(driver.stop())
