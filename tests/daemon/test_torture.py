"""The short form of ``make torture``: real daemons and servers killed, stopped, starved and lied to; nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TORTURE = Path(__file__).parent.parent.parent / "bench" / "torture.py"

ROWS = (
    "kill-standby", "kill-lone", "zombie", "restart", "failover", "storm", "churn", "forged", "forged-unguarded", "drain",
    "disk-full", "soak",
)  # fmt: skip
"""The failpoints have a test of their own."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bench/torture.py needs Linux")


def torture(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TORTURE), *arguments], capture_output=True, text=True, check=False, timeout=280
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("row", ROWS)
def test_nothing_is_lost(row: str, tmp_path: Path) -> None:
    done = torture("--short", "--rows", row, "--json", "--out", str(tmp_path))
    assert done.returncode in (0, 1, 2), done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if report["skipped"]:
        pytest.skip(report["skipped"][row])
    assert not report["broken"], report["broken"]
    (found,) = report["rows"]
    account = found["account"]
    assert account["events"] > 0
    assert account["received"] > 0
    # lost, phantom, dishonest, spoilt, doubled beyond what was in flight or unsettled, over a limit; never times
    assert found["failures"] == [], found
    assert row in (tmp_path / "torture.jsonl").read_text()
    assert found["title"] in (tmp_path / "torture.md").read_text()
    if row == "drain":
        again = torture("--short", "--rows", row, "--json", "--resume", "--out", str(tmp_path))
        assert json.loads(again.stdout)["rows"] == report["rows"], "trials that were made are not made again"


@pytest.mark.timeout(300)
def test_a_daemon_that_settles_before_the_answer_is_caught(tmp_path: Path) -> None:
    done = torture("--short", "--rows", "kill-standby", "--trials", "1", "--spoilt", "early", "--json", "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 1, done.stderr
    (found,) = json.loads(done.stdout)["rows"]
    assert found["account"]["lost"] > 0
    assert found["account"]["dishonest"] > 0
    assert f"{found['account']['lost']} lost" in found["failures"]


def test_a_row_that_is_none_is_refused(tmp_path: Path) -> None:
    done = torture("--rows", "kill-everybody", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "kill-everybody is none of kill-standby, kill-lone" in done.stderr
    listed = torture("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed if line.split()[0] != "failpoints"] == list(ROWS)
