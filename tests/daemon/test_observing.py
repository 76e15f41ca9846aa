"""What a daemon says of itself: metrics, the files in deploy/ that are made of them, probes, logs, traces."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hookd.commands.doctor import health_findings
from hookd.core.database import HOLDERS, DatabaseHealth, Holder
from hookd.postgres.health import examine
from tests.daemon_process import wait_until
from tests.producing import add_endpoint, fetch, send, wait_empty
from tests.receiver import OK, Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.daemon_process import DaemonProcess
    from tests.receiver import Call

ROOT = Path(__file__).parent.parent.parent
ADDED_BY_PROMETHEUS = {"job", "instance", "le"}
SELECTOR = re.compile(r"\b((?:hookd|process)_\w+)\b(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\bby \(([^)]*)\)")


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scraped(admin: str) -> dict[str, dict[str, set[str]]]:
    """Each series that a daemon exposes, with its labels and their values."""
    series: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(get(f"{admin}/metrics")[1]):
        for sample in family.samples:
            labels = series.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return series


def expressions() -> Iterator[tuple[str, str]]:
    """Every query of the dashboard and the alerts, with where it stands."""
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus-alerts.yml").read_text(encoding="utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


def test_what_is_in_deploy_refers_to_what_a_daemon_exposes(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    asyncio.run(fetch(dsn, "vacuum hookd.delivery"))
    daemon = start_daemon(HOOKD_RETRY__SCHEDULE="[]")

    async def go() -> None:
        async with Receiver() as good, Receiver(always(answer(500))) as bad:
            await add_endpoint(dsn, good.url)
            await add_endpoint(dsn, bad.url)
            await send(dsn)
            await wait_empty(dsn)

    asyncio.run(go())
    wait_until(lambda: "hookd_horizon_seconds" in scraped(daemon.admin), "PostgreSQL's health is looked at")
    wait_until(
        lambda: "exhausted" in scraped(daemon.admin)["hookd_verdicts_total"]["verdict"], "both were settled"
    )
    series = scraped(daemon.admin)
    used: set[str] = set()
    for where, expression in expressions():
        names = SELECTOR.findall(expression)
        assert names, where
        labels: set[str] = set()
        for name, selector in names:
            assert name in series, f"{where}: no daemon exposes {name}"
            used.add(name)
            labels |= set(series[name])
            for label, _, value in re.findall(r"(\w+)(=~?|!=)\"([^\"]*)\"", selector):
                if label in ADDED_BY_PROMETHEUS:
                    continue
                assert label in series[name], f"{where}: {name} has no label {label}"
                assert set(value.split("|")) & series[name][label], f"{where}: {label} is never {value}"
        for group in GROUPED.findall(expression):
            for label in filter(None, re.split(r",\s*", group)):
                assert label in labels | ADDED_BY_PROMETHEUS, f"{where}: by ({label})"
    ours = {re.sub(r"_(count|sum|created)$", "_bucket", n) for n in series if n.startswith("hookd_")}
    ours = {n for n in ours if not n.endswith("_bucket") or n in series}
    assert ours - used == {"hookd_sessions_visible"}, "on no panel and in no alert"
    # the documentation has every metric and every label, and no others
    documented = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8").partition("## Dashboard")[0]
    told = dict(re.findall(r"`(hookd_\w+)(?:\{(\w+)\})?`", documented))
    bare = {n.removesuffix("_bucket"): {*labels} - {"le"} for n, labels in series.items() if n in ours}
    assert {n: ({label} if label else set()) for n, label in told.items()} == bare
    assert scraped(daemon.admin)["hookd_horizon_transactions"]["holder"] == set(HOLDERS)
    assert all(len(values) <= 20 for labels in series.values() for n, values in labels.items() if n != "le")


def test_the_dashboard_has_one_datasource_and_it_is_a_variable() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    ids = set()
    for panel in dashboard["panels"]:
        assert panel["id"] not in ids
        ids.add(panel["id"])
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(t["datasource"]["uid"] == "${datasource}" for t in panel["targets"])
            assert all("$job" in t["expr"] for t in panel["targets"])
    text = json.dumps(dashboard)
    assert set(re.findall(r"\$\{?(\w+)", text)) <= {"datasource", "job", "__rate_interval"}


def test_promtool_finds_the_rules_right() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    for what, name in (("check", "prometheus-alerts.yml"), ("test", "prometheus-alerts.test.yml")):
        done = subprocess.run(
            [promtool, what, "rules", name], cwd=ROOT / "deploy", capture_output=True, text=True, check=False, timeout=60
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_ready_means_that_postgresql_answers(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon()
    ready = f"{daemon.admin}/readyz"
    assert get(ready)[0] == 200
    assert json.loads(get(ready)[1])["shards"] == 64
    (row,) = asyncio.run(
        fetch(dsn, "select pid from pg_stat_activity where application_name = 'hookd owner' and datname = current_database()")
    )  # fmt: skip
    os.kill(row["pid"], signal.SIGSTOP)
    try:
        wait_until(lambda: get(ready)[0] == 503, "the daemon says that it is not ready")
        assert get(f"{daemon.admin}/healthz")[0] == 200, "it is alive all the same"
        assert scraped(daemon.admin)["hookd_database_up"] == {}
        assert "hookd_database_up 0.0" in get(f"{daemon.admin}/metrics")[1]
    finally:
        os.kill(row["pid"], signal.SIGCONT)
    wait_until(lambda: get(ready)[0] == 200, "it is ready again")


def test_one_that_drains_is_not_ready(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon()
    ready = f"{daemon.admin}/readyz"

    async def go() -> None:
        hold = asyncio.Event()

        async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
            await hold.wait()
            writer.write(OK)

        async with Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url)
            await send(dsn)
            await receiver.wait_for_calls(1)
            assert (await asyncio.to_thread(get, ready))[0] == 200
            daemon.signal(signal.SIGTERM)
            await asyncio.to_thread(daemon.wait_for, "draining")
            status, said = await asyncio.to_thread(get, ready)
            assert status == 503
            assert "it is draining" in said
            hold.set()
            assert await asyncio.to_thread(daemon.process.wait, 60) == 0

    asyncio.run(go())


def test_the_trace_of_an_event_goes_with_every_attempt(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["100ms"]')
    context = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=1",
    }

    async def go() -> None:
        async with Receiver(always(answer(500))) as receiver:
            await add_endpoint(dsn, receiver.url)
            await send(dsn, headers=json.dumps(context))
            await receiver.wait_for_calls(2)
            for call in receiver.calls[:2]:
                assert {name: call.headers.get(name) for name in context} == context

    asyncio.run(go())


# PostgreSQL's health.


def look(dsn: str) -> DatabaseHealth:
    async def go() -> DatabaseHealth:
        connection = await asyncpg.connect(dsn)
        try:
            return await examine(
                connection.fetch, events_s=86400 * 30, attempts_s=86400 * 30, dead_letters_s=60
            )
        finally:
            await connection.close()

    return asyncio.run(go())


def test_who_holds_vacuum_back(dsn: str) -> None:
    async def go() -> DatabaseHealth:
        reader = await asyncpg.connect(dsn, server_settings={"application_name": "nightly dump"})
        writer = await asyncpg.connect(dsn)
        try:
            transaction = reader.transaction(isolation="repeatable_read")
            await transaction.start()
            await reader.fetch("select 1 from hookd.event")
            for _ in range(20):
                await writer.execute("insert into hookd.event (type, payload) values ('thing.made', '{}')")
            return await asyncio.to_thread(look, dsn)
        finally:
            await reader.close()
            await writer.close()

    found = asyncio.run(go())
    holder = found.holding("session")
    assert holder is not None
    assert holder.transactions >= 20
    assert holder.seconds is not None
    assert "nightly dump" in holder.who
    assert "idle in transaction" in holder.who
    assert "nightly dump" in str(found.longest_who)
    assert found.visible
    assert found.ahead == {"event": 2, "attempt": 2}
    assert found.behind_s == {"event": 0, "attempt": 0, "dead_letter": 0}
    assert found.notify_usage == 0
    assert look(dsn).holding("session") is None, "it has ended"


def test_days_and_retention_that_are_behind(dsn: str) -> None:
    asyncio.run(
        fetch(dsn, "insert into hookd.dead_letter values (1, hookd.uuid7(), 1, 1, now() - interval '2 hours', null, 'x', 't', 'a.b', '{}', null, now())")
    )  # fmt: skip
    found = look(dsn)
    assert 7000 < found.behind_s["dead_letter"] < 7300
    said = {f.what: (f.level, f.said) for f in health_findings(found)}
    assert said["retention"] == (
        "warn",
        "behind: dead_letter by 1 h 59 min; does a daemon run, or a reader hold a day?",
    )
    assert said["days"] == ("ok", "2 made ahead")
    assert said["vacuum"][0] == "ok"


def test_doctor_names_who_it_is() -> None:
    bad = DatabaseHealth(
        (Holder("session", 1_200_000, 7200, "process 17, dump"), Holder("replication_slot", 9_000_000, None, "replication slot old, not in use")),
        visible=False, longest_transaction_s=7200, longest_who="process 17, dump", notify_usage=0.7, dead_rows=2_000_000,
        live_rows=5, queue_bytes=2**30, vacuumed_s=None, ahead={"event": 0, "attempt": 2}, behind_s={"event": 90000},
    )  # fmt: skip
    said = [(f.level, f.what, f.said) for f in health_findings(bad)]
    assert ("warn", "vacuum", "held back for 1,200,000 transactions and 2 h by process 17, dump") in said
    assert (
        "warn",
        "vacuum",
        "held back for 9,000,000 transactions by replication slot old, not in use",
    ) in said
    assert {what for level, what, _ in said if level == "ok"} == set()
    assert {what for level, what, _ in said if level == "fail"} == {"notifications"}


# Logs.


def keys_returned(tree: ast.Module, name: str) -> set[str]:
    """The keys of the dictionaries that a method of this module makes."""
    return {
        str(key.value)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == name
        for node in ast.walk(function)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }


def keys_logged() -> dict[str, str]:
    """Every key that a log call in the source gives, and where."""
    found: dict[str, str] = {}
    # what an outage says of its length
    logs = ast.parse((ROOT / "hookd" / "logs.py").read_text(encoding="utf-8"))
    for path in sorted((ROOT / "hookd").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "log = structlog.get_logger" not in text:
            continue
        tree = ast.parse(text)
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            dictionaries: dict[str, set[str]] = {}
            for node in ast.walk(function):
                if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Dict):
                    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                    names = {str(k.value) for k in node.value.keys if isinstance(k, ast.Constant)}
                    dictionaries |= {t.id: names for t in targets if isinstance(t, ast.Name)}
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                    target = node.targets[0]
                    if isinstance(target.value, ast.Name) and isinstance(target.slice, ast.Constant):
                        dictionaries.setdefault(target.value.id, set()).add(str(target.slice.value))
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Call)
                    and ast.unparse(node.func).partition(".")[0] in ("log", "say")
                ):  # fmt: skip
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    assert len(node.args) == 1, f"{where}: one sentence, and keys"
                    assert isinstance(node.args[0], ast.Constant), f"{where}: a sentence without values"
                    for keyword in node.keywords:
                        if keyword.arg is None:
                            if isinstance(keyword.value, ast.Name):
                                found |= dict.fromkeys(dictionaries[keyword.value.id], where)
                            else:
                                assert isinstance(keyword.value, ast.Call), where
                                assert isinstance(keyword.value.func, ast.Attribute), where
                                found |= dict.fromkeys(keys_returned(logs, "lasts"), where)
                        elif keyword.arg != "exc_info":
                            found[keyword.arg] = where
    return found


def test_the_documentation_lists_every_key_of_the_log() -> None:
    text = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    section = text.partition("## Logs")[2].partition("## Traces")[0]
    listed = set()
    for line in section.splitlines():
        if line.startswith("| `"):
            listed |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    logged = keys_logged()
    assert len(logged) > 30
    always = {"timestamp", "level", "event", "exception"}
    assert {k: where for k, where in logged.items() if k not in listed} == {}, (
        "keys that docs/observing.md lacks"
    )
    assert listed - set(logged) == always, "keys that nothing logs"


def test_lines_are_json_with_the_listed_keys(start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon()
    daemon.stop()
    lines: list[dict[str, Any]] = daemon.log()
    known = set(keys_logged()) | {"timestamp", "level", "event", "exception"}
    assert len(lines) >= 4
    for line in lines:
        assert {"timestamp", "level", "event"} <= set(line) <= known, line
