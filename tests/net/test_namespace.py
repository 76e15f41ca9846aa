"""No way in: ten thousand attempts on a network where whatever is dialled would be noticed."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.net.canary import OWN, TARGETS_4

ROOT = Path(__file__).parent.parent.parent

TARGETS_DIALLED = set(TARGETS_4) - {"0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255"}
"""The kernel connects to these as they are."""


@functools.cache
def namespace() -> list[str]:
    """The command that starts another one in a network of its own; empty where that cannot be."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return []
    for command in (["unshare", "-n"], ["unshare", "-Urn"]):
        if (
            subprocess.run(
                [*command, "ip", "link", "set", "lo", "up"], capture_output=True, check=False
            ).returncode
            == 0
        ):
            return command
    return []


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not namespace(),
    reason="needs Linux, ip and a network namespace (unshare -n as root, or user namespaces)",
)


def run(mode: str, every: int) -> Any:
    done = subprocess.run(
        [*namespace(), sys.executable, "-m", "tests.net.canary", mode, str(every)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_canary_is_never_touched() -> None:
    report = run("whole", 1)
    print(f"{report['attempts']} attempts in {report['seconds']} s: {report['by_position']}")  # noqa: T201 - the figure
    assert report["touched"] == {}
    assert report["attempts"] >= 10_000
    assert report["unexpected"] == []
    assert report["served"] == report["written"], "the public receiver got what was sent, and nobody else did"
    assert report["served"] > 1000
    shown = [
        r for r in report["reasons"] if any(c.isdigit() for c in r.replace("IPv4", "").replace("IPv6", ""))
    ]
    assert all(r.startswith("port ") or "longer than" in r or "65535" in r for r in shown), shown
    assert "the address is not allowed" in report["reasons"]


def test_the_guard_at_the_socket_holds_alone() -> None:
    report = run("socket", 7)
    assert report["touched"] == {}
    assert report["served"] == report["written"] > 100


def test_the_canary_sings_where_a_private_address_is_what_python_says() -> None:
    """The same attempts with ``ipaddress.is_private`` for a guard get in: so there is something to be kept out."""
    report = run("is_private", 7)
    touched = {address.rpartition(":")[0] for address in report["touched"]}
    assert touched & {"100.64.0.1", "100.100.100.200", "168.63.129.16", "192.88.99.1", OWN}
    assert any(":" in address for address in touched)


def test_the_canary_sings_for_every_address_that_nobody_guards() -> None:
    report = run("none", 7)
    touched = {address.rpartition(":")[0] for address in report["touched"]}
    assert len(touched & TARGETS_DIALLED) > len(TARGETS_DIALLED) / 2
    assert len({address.rpartition(":")[2] for address in report["touched"]}) >= 12
