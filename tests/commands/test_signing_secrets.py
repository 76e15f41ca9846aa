"""Signing secrets on the command line: made, imported, shown once, rotated from one kind to the other, checked."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING

import pytest

from hookd.core.signing import new_secret, parse_secret, public_key, sign
from tests.cli import Cli
from tests.producing import fetch
from tests.receiver import Receiver

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_server")


@pytest.fixture
def cli(dsn: str, tmp_path: Path) -> Cli:
    return Cli(dsn, tmp_path)


def test_a_key_pair_is_shown_once_and_its_public_half_always(cli: Cli) -> None:
    text = cli.ok("endpoint", "add", "http://127.0.0.1:9000/", "--key-type", "ed25519")
    said = dict(line.split("  ", 1) for line in text.splitlines())
    identity, secret, public = (said[k].strip() for k in ("id", "secret", "public key"))
    assert secret.startswith("whsk_")
    assert len(base64.b64decode(secret.removeprefix("whsk_"))) == 64
    for _ in range(2):
        shown = cli.ok("endpoint", "show", identity)
        assert public in shown
        assert secret not in shown
        assert "whsk_" not in shown
    (listed,) = cli.json("endpoint", "list")
    assert listed["public_keys"] == [public]


def test_a_secret_that_you_have_is_taken_and_not_printed(cli: Cli, tmp_path: Path) -> None:
    secret = new_secret(b"s" * 32, "ed25519")
    (tmp_path / "key").write_text(secret.reveal() + "\n")
    (made,) = cli.json("endpoint", "add", "http://127.0.0.1:9000/", "--secret", "@key")
    assert made["public_key"] == public_key(secret)
    assert "secret" not in made
    assert "of type ed25519" in cli.fails(
        2, "endpoint", "add", "http://127.0.0.1:9000/", "--secret", "@key", "--key-type", "hmac"
    )
    assert "missing cannot be read" in cli.fails(
        2, "endpoint", "add", "http://127.0.0.1:9000/", "--secret", "@missing"
    )
    # what is exported for `verify` and `listen` is not taken for a new endpoint's
    (made,) = cli.json("endpoint", "add", "http://127.0.0.1:9000/", HOOKD_SECRET=secret.reveal())
    assert made["secret"].startswith("whsec_")


def test_a_secret_that_process_lists_show_is_noted_and_stdin_is_another_way(cli: Cli) -> None:
    secret = new_secret(b"s" * 32).reveal()
    url = "http://127.0.0.1:9000/"
    typed = cli("endpoint", "add", url, "--secret", secret, "--json")
    assert typed.returncode == 0
    assert "everybody on this machine" in typed.stderr
    assert secret not in typed.stdout + typed.stderr
    piped = cli("endpoint", "add", url, "--secret", "-", "--json", stdin=secret + "\n")
    assert (piped.returncode, piped.stderr) == (0, "")
    assert secret not in piped.stdout
    body, signed = b"{}", int(time.time())
    signature = sign([parse_secret(secret)], "m1", signed, body)
    captured = f"webhook-id: m1\nwebhook-timestamp: {signed}\nwebhook-signature: {signature}\n\n{{}}"
    assert cli.ok("verify", stdin=captured, HOOKD_SECRET=secret)
    assert "stdin is the request" in cli.fails(2, "verify", "--secret", "-", stdin=captured)


def test_headers_may_come_from_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("authorization: Bearer planted\n\nx-env: prod\r\n")
    add = ("endpoint", "add", "http://127.0.0.1:9000/", "--header")
    (made,) = cli.json(*add, "@headers", "--header", "x-other: 1")
    assert made["header_names"] == ["authorization", "x-env", "x-other"]
    (tmp_path / "headers").write_text("Bearer planted\n")
    assert "planted" not in (said := cli.fails(2, *add, "@headers"))
    assert "number 1 has no colon" in said
    assert "missing cannot be read" in cli.fails(2, *add, "@missing")
    # what is typed is one header, whatever is in it
    assert cli.fails(2, *add, "x-a: 1\nx-b: 2")


def lives(dsn: str) -> list[float | None]:
    """For how many hours the secrets of an endpoint sign, oldest first; None: no end is set."""
    rows = asyncio.run(fetch(dsn, "select created_at, expires_at from hookd.endpoint_secret order by id"))
    return [r["expires_at"] and (r["expires_at"] - r["created_at"]).total_seconds() / 3600 for r in rows]


def test_rotation_keeps_the_kind_unless_told_otherwise(cli: Cli) -> None:
    (made,) = cli.json("endpoint", "add", "http://127.0.0.1:9000/", "--key-type", "ed25519")
    (rotated,) = cli.json("endpoint", "rotate", made["id"])
    assert rotated["secret"].startswith("whsk_")
    assert rotated["public_keys"] == [rotated["public_key"], made["public_key"]]
    assert lives(cli.dsn) == [pytest.approx(24, abs=0.2), None]
    (rotated,) = cli.json("endpoint", "rotate", made["id"], "--key-type", "hmac", "--overlap", "1h")
    assert lives(cli.dsn) == [pytest.approx(1, abs=0.2), pytest.approx(1, abs=0.2), None]
    assert rotated["secret"].startswith("whsec_")
    assert (rotated["secrets"], rotated["key_type"]) == (3, "hmac")


def test_a_rotation_from_one_kind_to_the_other_signs_with_both(cli: Cli) -> None:
    async def go() -> None:
        async with Receiver() as receiver:
            (made,) = await asyncio.to_thread(cli.json, "endpoint", "add", receiver.url)
            (rotated,) = await asyncio.to_thread(
                cli.json, "endpoint", "rotate", made["id"], "--key-type", "ed25519"
            )
            await asyncio.to_thread(cli.ok, "endpoint", "test", made["id"])
            call = receiver.calls[0]
            captured = call.raw_head.decode() + call.body.decode()
            for checker in (made["secret"], rotated["public_key"], rotated["secret"]):
                said = await asyncio.to_thread(cli.ok, "verify", "--secret", checker, stdin=captured)
                assert said == "the signature is right\n"
            stranger = public_key(new_secret(b"o" * 32, "ed25519"))
            assert stranger is not None
            done = await asyncio.to_thread(cli, "verify", "--secret", stranger, stdin=captured)
            assert done.returncode == 1
            assert "no signature matches" in done.stdout

    asyncio.run(go())
