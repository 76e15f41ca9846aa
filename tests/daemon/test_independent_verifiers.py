"""
What the daemon really sent, checked by verifiers that are not ours: before, during and after rotations, and with one bit changed.

Python's ``standardwebhooks``, PyNaCl and, where node is there, its crypto are always asked.  With ``HOOKD_TEST_VERIFIERS=1``
(.ci/run sets it) the libraries of ``tests/verifiers`` are installed into a temporary folder, pinned by hash, and asked too:
``standardwebhooks`` and ``svix`` from npm, and the verifier of ``svix`` from PyPI, which wraps Python's
``standardwebhooks``.  No published library knows ``v1a``.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import nacl.exceptions
import nacl.signing
import pytest
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from hookd.core.sealing import PLAIN
from hookd.core.signing import new_secret, public_key
from hookd.postgres import registry
from tests.producing import add_endpoint_with_id, send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess
    from tests.receiver import Call

pytestmark = pytest.mark.usefixtures("one_server")

HERE = Path(__file__).parents[1] / "verifiers"

INSTALL_S = 60.0

PAYLOADS = [
    "{}", "1", '""', "null", "[ ]", '{"a": 1.0e-7, "b": 12345678901234567890, "a": 2}', '"\\r\\n\\t"',
    '{"line": "\u2028\u2029", "astral": "😀𝄞", "latin": "é"}', ' {"spaces" :\t[1 , 2]} ', '"' + "x" * (1 << 18) + '"',
]  # fmt: skip

Case = tuple[str, dict[str, str], bytes, bool]
"""A key, the headers that are signed, the body, and whether that has to be accepted."""


@pytest.fixture(autouse=True)
def once(request: pytest.FixtureRequest) -> None:
    """What is signed does not depend on the server's version."""
    if request.node.callspec.params.get("server_dsn") == "system":
        pytest.skip("one server is enough")


def flipped(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(7)]) + data[at + 1 :]


def mutants(key: str, headers: dict[str, str], body: bytes, dice: random.Random) -> list[Case]:
    """The same request with one bit changed: of the id, of the time, of the body, or of all signatures."""
    digit = str(int(headers["webhook-timestamp"]) ^ 1)
    entries = [entry.partition(",") for entry in headers["webhook-signature"].split(" ")]
    signatures = [
        f"{scheme},{base64.b64encode(flipped(base64.b64decode(text), dice)).decode()}"
        for scheme, _, text in entries
    ]
    other_scheme = [f"{ {'v1': 'v1a', 'v1a': 'v1'}[scheme] },{text}" for scheme, _, text in entries]
    return [
        (key, headers | {"webhook-id": headers["webhook-id"][:-1] + "~"}, body, False),
        (key, headers | {"webhook-timestamp": digit}, body, False),
        (key, headers, flipped(body, dice), False),
        (key, headers, body + b"\n", False),
        (key, headers | {"webhook-signature": " ".join(signatures)}, body, False),
        (key, headers | {"webhook-signature": " ".join(other_scheme)}, body, False),
    ]


def signed(call: Call) -> dict[str, str]:
    return {name: call.headers[name] for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}


async def captured(dsn: str) -> list[tuple[Call, dict[str, bool]]]:
    """Requests of the daemon, each with the keys that must, and must not, accept it."""
    second = new_secret(os.urandom(32))
    pair = new_secret(os.urandom(32), "ed25519")
    public = public_key(pair)
    assert public is not None
    found: list[tuple[Call, dict[str, bool]]] = []
    async with Receiver() as receiver:
        first, endpoint = await add_endpoint_with_id(dsn, receiver.url)
        connection = await asyncpg.connect(dsn)

        async def stretch(schemes: list[str], **accepting: bool) -> None:
            """Send everything once the daemon signs with these."""
            async with asyncio.timeout(30):
                while True:
                    await send(dsn)
                    await wait_empty(dsn)
                    entries = receiver.calls[-1].headers["webhook-signature"].split(" ")
                    if [entry.partition(",")[0] for entry in entries] == schemes:
                        break
            before = len(receiver.calls)
            for payload in PAYLOADS:
                await connection.execute("select hookd.send('thing.made', $1::text)", payload)
            await wait_empty(dsn)
            keys = {"first": first, "second": second.reveal(), "public": public}
            calls = receiver.calls[before:]
            assert len(calls) == len(PAYLOADS)
            found.extend((call, {keys[name]: holds for name, holds in accepting.items()}) for call in calls)

        await stretch(["v1"], first=True, second=False, public=False)
        await registry.rotate(connection, endpoint, second, 3600, keyring=PLAIN)
        await stretch(["v1", "v1"], first=True, second=True, public=False)
        await registry.rotate(connection, endpoint, pair, 3600, keyring=PLAIN)
        await stretch(["v1a", "v1", "v1"], first=True, second=True, public=True)
        await connection.execute(
            "update hookd.endpoint_secret set expires_at = now() where expires_at is not null"
        )
        await connection.execute("update hookd.endpoint set updated_at = now()")
        await stretch(["v1a"], first=False, second=False, public=True)
        await connection.close()
    return found


def cases(found: list[tuple[Call, dict[str, bool]]]) -> list[Case]:
    dice = random.Random(5)
    made: list[Case] = []
    for call, keys in found:
        for key, holds in keys.items():
            made.append((key, signed(call), call.body, holds))
            if holds:
                made += mutants(key, signed(call), call.body, dice)
    return made


# The verifiers.


def by_library(webhook: type[Any]) -> Callable[[str, dict[str, str], bytes], bool]:
    def accepts(key: str, headers: dict[str, str], body: bytes) -> bool:
        try:
            webhook(key).verify(body, headers)
        except WebhookVerificationError:
            return False
        except UnicodeDecodeError:  # a bit of the body was changed: the library wants text
            return False
        except ValueError:  # the signature is right, and the body is no JSON: that is told after the check
            return True
        return True

    return accepts


def by_pynacl(key: str, headers: dict[str, str], body: bytes) -> bool:
    public = nacl.signing.VerifyKey(base64.b64decode(key.removeprefix("whpk_")))
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    for entry in headers["webhook-signature"].split(" "):
        scheme, _, text = entry.partition(",")
        try:
            if scheme == "v1a":
                public.verify(content, base64.b64decode(text))
                return True
        except (nacl.exceptions.BadSignatureError, ValueError):
            continue
    return False


def by_node(all_cases: list[Case], folder: Path, *more: str) -> list[list[str]]:
    shutil.copy(HERE / "verify.mjs", folder)
    lines = [
        json.dumps({"key": key, "headers": headers, "body": base64.b64encode(body).decode()})
        for key, headers, body, _ in all_cases
    ]
    done = subprocess.run(
        ["node", str(folder / "verify.mjs"), *more],
        input="\n".join(lines), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(name: str, accepts: Callable[[str, dict[str, str], bytes], bool], all_cases: list[Case], scheme: str) -> None:  # fmt: skip
    asked = [case for case in all_cases if case[0].startswith(scheme)]
    wrong = [case for case in asked if accepts(*case[:3]) is not case[3]]
    assert not wrong, f"{name} on {len(wrong)} of {len(asked)}: {wrong[0]!r:.2000}"
    assert {case[3] for case in asked} == {True, False}


def check_node(all_cases: list[Case], folder: Path, names: set[str], *more: str) -> None:
    for case, accepted in zip(all_cases, by_node(all_cases, folder, *more), strict=True):
        able = names if case[0].startswith("whsec_") else names & {"node:crypto"}
        assert set(accepted) == (able if case[3] else set()), case


# What is asked.


def installed(folder: Path) -> Any:
    """Install the libraries into a folder; returns ``svix.Webhook`` of PyPI.  Skips where they cannot be had."""
    if os.environ.get("HOOKD_TEST_VERIFIERS") != "1":
        pytest.skip("HOOKD_TEST_VERIFIERS=1 installs and asks them")
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not on PATH")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    python = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--retries",
        "0",
        "--no-deps",
    ]
    commands = (
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries", "0"],
        [*python, "--only-binary", ":all:", "--require-hashes", "--target", str(folder / "python"), "-r", str(HERE / "requirements.txt")],
    )  # fmt: skip
    for command in commands:
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False, timeout=INSTALL_S
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{command[0]} did not install them within {INSTALL_S:.0f} s")
        if done.returncode:
            pytest.skip(f"they cannot be installed: {(done.stderr or done.stdout).strip()[-300:]}")
    # past the package, whose head asks for an HTTP client
    spec = importlib.util.spec_from_file_location("svix_webhooks", folder / "python" / "svix" / "webhooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Webhook


@pytest.mark.parametrize("by", ["what is here", "installed libraries"])
def test_verifiers_of_others_accept_what_was_sent_and_nothing_else(
    dsn: str, tmp_path: Path, request: pytest.FixtureRequest, by: str
) -> None:
    svix = installed(tmp_path) if by == "installed libraries" else None
    start: Callable[..., DaemonProcess] = request.getfixturevalue("start_daemon")
    start()
    all_cases = cases(asyncio.run(captured(dsn)))
    assert len(all_cases) > 500
    check("standardwebhooks", by_library(Webhook), all_cases, "whsec_")
    check("PyNaCl", by_pynacl, all_cases, "whpk_")
    if svix is not None:
        check("svix", by_library(svix), all_cases, "whsec_")
        check_node(all_cases, tmp_path, {"node:crypto", "npm standardwebhooks", "npm svix"}, "installed")
    elif shutil.which("node") is not None:
        check_node(all_cases, tmp_path, {"node:crypto"})
