"""No secret anywhere: secrets are planted, everything is made to talk, and what it said is searched for them."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from hookd.keyfile import add_key
from tests.cli import Cli
from tests.conftest import run_sql
from tests.producing import send, wait_empty, wait_for_row
from tests.receiver import Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess

BEARER = "planted-bearer-7d1f"
TOKEN = "planted-token-93ab"
PASSWORD = "planted-password-5c2e"
MASTER = b"planted-master-key-of-32-bytes!!"
SIGNING = "whsec_" + base64.b64encode(b"planted signing secret 0123456789").decode()
PRIVATE = "whsk_" + base64.b64encode(b"planted-private-seed-of-32-bytes").decode()

PLANTED = {
    "secret header": BEARER,
    "admin token": TOKEN,
    "password of the database": PASSWORD,
    "master key": base64.b64encode(MASTER).decode(),
    "master key, raw": MASTER.decode(),
    "shared secret": SIGNING.removeprefix("whsec_")[:30],
    "private key": PRIVATE.removeprefix("whsk_")[:30],
}


class Heard:
    """All that was said, by whom."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def add(self, who: str, text: str) -> None:
        self.said.append((who, text))

    def search(self) -> list[str]:
        return [
            f"{what} in: {who}"
            for who, text in self.said
            for what, secret in PLANTED.items()
            if secret in text
        ]


@pytest.fixture(autouse=True)
def once(request: pytest.FixtureRequest) -> None:
    """It starts a hundred processes, and what they print does not depend on the server's version."""
    if request.node.callspec.params.get("server_dsn") == "system":
        pytest.skip("one server is enough: what is printed does not depend on its version")


@pytest.fixture
def login(dsn: str) -> Any:
    """A DSN whose password is planted."""
    name = f"login_{os.urandom(4).hex()}"
    run_sql(dsn, f"create role {name} login password '{PASSWORD}' in role hookd_daemon")
    yield re.sub(r"//[^@]*@", f"//{name}:{PASSWORD}@", dsn)
    run_sql(dsn, f"drop role {name}")


@pytest.mark.timeout(600)  # a hundred processes: 50 s where nothing else runs
def test_nothing_that_is_printed_anywhere_has_a_secret_in_it(
    dsn: str, login: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    keyfile, token_file = str(tmp_path / "master.key"), tmp_path / "token"
    add_key(keyfile, MASTER)
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    environment = {
        "HOOKD_DATABASE__DSN": login, "HOOKD_SECURITY__MASTER_KEY_FILE": keyfile, "HOOKD_ADMIN__TOKEN_FILE": str(token_file),
    }  # fmt: skip
    heard = Heard()
    daemon = start_daemon(HOOKD_LOG__LEVEL="debug", HOOKD_RETRY__SCHEDULE='["50ms"]', **environment)
    cli = Cli(login, tmp_path)

    def run(*arguments: str, **more: Any) -> str:
        done = cli(*arguments, **{**environment, **more})
        heard.add(f"hookd {' '.join(a for a in arguments if 'planted' not in a)}", done.stdout + done.stderr)
        return done.stdout

    def ask(method: str, path: str, body: Any = None, token: str = TOKEN) -> Any:
        request = urllib.request.Request(daemon.admin + path, method=method)
        request.add_header("authorization", f"Bearer {token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("content-type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=20) as got:
                text = got.read().decode() + str(got.headers)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode() + str(error.headers)
        heard.add(f"{method} {path}", text)
        return text

    async def life() -> None:
        async with Receiver() as good, Receiver(always(answer(500, b"no"))) as bad:
            await asyncio.to_thread(talk, good.url, bad.url)
            await send(dsn, "thing.made")
            await wait_empty(dsn)
            await wait_for_row(dsn, "select 1 from hookd.dead_letter")
            await asyncio.to_thread(afterwards)

    def talk(good: str, bad: str) -> None:
        (tmp_path / "signing").write_text(SIGNING)
        (tmp_path / "private").write_text(PRIVATE)
        for url, secret in ((good, "@signing"), (bad, "@private")):
            run(
                "endpoint",
                "add",
                url,
                "--secret",
                secret,
                "--header",
                f"authorization: Bearer {BEARER}",
                "--json",
            )
        ask("POST", "/api/v1/endpoints", {"url": good, "secret": PRIVATE, "headers": {"x-key": BEARER}})
        # and in every place where it does not belong
        run("endpoint", "add", good, "--secret", SIGNING + "!")
        run("endpoint", "add", good, "--secret", PRIVATE, "--key-type", "hmac")
        run("endpoint", "add", good, "--header", f"authorization: {BEARER}\n")
        run("endpoint", "add", good, "--header", BEARER)
        ask("POST", "/api/v1/endpoints", {"url": good, "secret": SIGNING, "key_type": "ed25519"})
        ask("POST", "/api/v1/endpoints", {"url": good, "headers": {"authorization": [BEARER]}})
        ask("POST", "/api/v1/endpoints", {"url": good, "headers": {"authorization": BEARER + "\n"}})
        ask("GET", "/api/v1/status", token=TOKEN + "x")
        wrong = (
            ("HOOKD_SECURITY__MASTER_KEY_FILE", base64.b64encode(MASTER).decode()), ("HOOKD_ADMIN__TOKEN_FILE", TOKEN),
            ("HOOKD_DATABASE__PASSWORD_FILE", PASSWORD), ("HOOKD_DATABASE__DSN", f"mysql://u:{PASSWORD}@h/d"),
            ("HOOKD_DATABASE__DSN", f"postgresql://u:{PASSWORD}/x@h/d"), ("HOOKD_DATABASE__DSN", f"postgresql://u:x#{PASSWORD}@h/d"),
            ("HOOKD_DATABASE__DSN", f"postgresql://u:x?{PASSWORD}@h/d"), ("HOOKD_DATABASE__DSN", f"postgresql://{PASSWORD}:x:y@h:z/d"),
            ("HOOKD_DATABASE__DSN", f"postgresql://u:{PASSWORD}@127.0.0.1:1/d"),
        )  # fmt: skip
        for name, value in wrong:
            if name != "HOOKD_DATABASE__DSN" or not value.startswith(f"postgresql://{PASSWORD}"):
                for command in (("check-config",), ("status",), ("doctor",), ("config", "show")):
                    run(*command, **{name: value})
        for text in (base64.b64encode(MASTER).decode()[:-5], f"{MASTER.decode()}", f"{MASTER.hex()}é"):
            (tmp_path / "bad.key").write_text(text)
            (tmp_path / "bad.key").chmod(0o600)
            run("doctor", HOOKD_SECURITY__MASTER_KEY_FILE=str(tmp_path / "bad.key"))
            run("secrets", "new-key", str(tmp_path / "bad.key"))
        (tmp_path / "broken.toml").write_text(f'[database]\ndsn = "postgresql://u:{PASSWORD}@h/d\n')
        run("check-config", "--config", str(tmp_path / "broken.toml"))
        (tmp_path / "broken.toml").write_text(f"[database]\ndsn = 5 {PASSWORD}\n")
        run("check-config", "--config", str(tmp_path / "broken.toml"))

    def afterwards() -> None:
        identities = [json.loads(line)["id"] for line in run("endpoint", "list", "--json").splitlines()]
        for identity in identities:
            for command in (
                ("show",), ("test",), ("verify",), ("rotate", "--secret", "@signing"), ("update", "--description", "x"),
                ("pause",), ("resume",),
            ):  # fmt: skip
                run("endpoint", command[0], identity, *command[1:])
                run("endpoint", command[0], identity, *command[1:], "--json")
            for verb, path in (("GET", ""), ("POST", "/verify"), ("POST", "/rotate")):
                ask(
                    verb,
                    f"/api/v1/endpoints/{identity}{path}",
                    {"secret": PRIVATE} if path == "/rotate" else None,
                )
        commands: list[tuple[str, ...]] = [
            ("endpoint", "list"), ("config", "show"), ("config", "schema"), ("doctor",), ("status",), ("top", "--once"),
            ("attempts", "--full"), ("event", "list"), ("secrets", "rotate", "--dry-run"), ("secrets", "rotate"),
            ("secrets", "new-key", keyfile), ("secrets", "rotate"),
        ]  # fmt: skip
        for words in commands:
            run(*words)
            if words[:2] != ("config", "schema") and words[0] != "secrets":
                run(*words, "--json")
        for path in (
            "/",
            "/metrics",
            "/healthz",
            "/readyz",
            "/api/v1/status",
            "/api/v1/endpoints",
            "/api/v1/attempts",
        ):
            ask("GET", path)
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("configuration applied")
        run_sql(
            dsn,
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'hookd %'",
        )
        daemon.wait_for("database is back")
        (tmp_path / "master.key").chmod(0o644)
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("configuration not applied")

    asyncio.run(life())
    daemon.stop()
    heard.add("the daemon's log", json.dumps(daemon.log()))
    assert len(heard.said) > 100
    assert heard.search() == []
    # the search finds what is there: an endpoint's header is named, the id of its key is said
    assert any("authorization" in text for _, text in heard.said)
    assert "configuration applied" in heard.said[-1][1]
