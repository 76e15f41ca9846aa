"""docs/api.md: every call as it stands there, against a daemon."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hookd.admin.api import Api
from hookd.admin.operations import operations
from tests.producing import add_endpoint_with_id, fetch, send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

DOC = Path(__file__).parent.parent / "docs" / "api.md"

ADDRESS = "API=http://127.0.0.1:8440/api/v1"


def calls() -> list[str]:
    """The commands of the document, one a string."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert lines[0] == ADDRESS
    return lines[1:]


@pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True)
def test_every_call_works(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")

    async def go() -> None:
        async with Receiver() as receiver:
            # the example's address needs no DNS that way
            admin = start_daemon(HOOKD_NETWORK__NAMESERVERS='["127.0.0.1"]').admin
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url, tenant="acme")
            event = await send(dsn, "user.created", '{"id": 123}', tenant="acme")
            await wait_empty(dsn)
            delivery = (await fetch(dsn, "select delivery_id from hookd.attempt"))[0]["delivery_id"]
            settings = f"API={admin}/api/v1 ENDPOINT={endpoint} EVENT={event} DELIVERY={delivery}\n"
            for call in calls():
                assert call.startswith("curl -sf"), call
                done = await asyncio.to_thread(
                    subprocess.run,
                    ["bash", "-c", settings + call],
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert done.returncode == 0, (call, done.stdout, done.stderr)
                assert json.loads(done.stdout), call
                if "resend" in call:
                    await wait_empty(dsn)
            _, *rest = (
                row["action"] for row in await fetch(dsn, "select action from hookd.audit order by id")
            )
            assert rest[:3] == ["endpoint.update", "endpoint.pause", "endpoint.resume"]

    asyncio.run(go())


def test_every_operation_is_in_the_document() -> None:
    text = DOC.read_text(encoding="utf-8")
    shown = " ".join(calls()).replace('"', "") + " "
    for each in operations(Api):
        path = each.path.replace("{id}", "$EVENT" if each.path.startswith("/events") else "$ENDPOINT")
        path = path.replace("{number}", "$DELIVERY")
        assert re.search(rf"\$API{re.escape(path)}[ ?]", shown), f"{each.method} {each.path} has no example"
    assert "`DELETE`" in text
