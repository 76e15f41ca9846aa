"""The layers: a module imports only downwards, and keeps to what its floor may do."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "hookd"

FLOORS = {
    # the longest prefix counts
    "hookd.core": 1,
    "hookd.postgres": 2,
    "hookd.net": 2,
    "hookd.clock": 2,
    "hookd.config": 2,
    "hookd.keyfile": 2,
    "hookd.feed": 3,
    "hookd.pacing": 2,
    "hookd.recorder": 3,
    "hookd.dispatcher": 3,
    "hookd.upkeep": 3,
    "hookd.tally": 3,
    "hookd.trial": 3,
    "hookd.verification": 3,
    "hookd.failpoints": 4,
    "hookd.logs": 4,
    "hookd.reports": 4,
    "hookd.tenure": 4,
    "hookd.systemd": 4,
    "hookd.telemetry": 4,
    "hookd.daemon": 4,
    "hookd.admin": 4,
    "hookd.console": 4,
    "hookd.guide": 4,
    "hookd.commands": 5,
    "hookd.__main__": 5,
    "hookd": 0,
}

MODULES = sorted(ROOT.rglob("*.py"))

CORE_MAY_IMPORT = {
    "__future__", "base64", "binascii", "bisect", "collections", "cryptography", "dataclasses", "datetime", "enum", "functools",
    "hashlib", "heapq",
    "hmac", "idna", "ipaddress", "itertools", "json", "re", "typing", "urllib", "uuid",
}  # fmt: skip

ONLY_IN = {
    "asyncpg": ("hookd.postgres", "hookd.admin", "hookd.console", "hookd.commands"),
    "cryptography": ("hookd.core",),
    "aiodns": ("hookd.net",),
    "pycares": ("hookd.net",),
    "aiohttp": ("hookd.net", "hookd.admin", "hookd.console"),
    "jinja2": ("hookd.console",),
    "markupsafe": ("hookd.console",),
    "uvloop": ("hookd.commands",),
    "click": ("hookd.commands",),
    "prometheus_client": ("hookd.telemetry",),
    "markdown_it": ("hookd.guide",),
    "jsonschema_rs": ("hookd.guide",),
    "random": ("hookd.clock", "hookd.commands"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    prefix = module
    while prefix not in FLOORS:
        assert "." in prefix, f"{module} has no floor: add it to FLOORS"
        prefix = prefix.rpartition(".")[0]
    assert prefix != "hookd" or module == "hookd", f"{module} has no floor: add it to FLOORS"
    return FLOORS[prefix]


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Modules imported at run time, and whether for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in typing_only))
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downwards_only(path: Path) -> None:
    module = name_of(path)
    for imported, typing_only in imports_of(path):
        if imported.startswith("hookd"):
            above = floor_of(imported) > floor_of(module)
            # telemetry reads the daemon that shows it: a type, not an import
            assert not above or typing_only, f"{module} imports {imported}, which is above it"


@pytest.mark.parametrize("path", [p for p in MODULES if "core" in p.parts], ids=name_of)
def test_the_core_does_no_io(path: Path) -> None:
    for imported, _ in imports_of(path):
        top = imported.partition(".")[0]
        assert top == "hookd" or top in CORE_MAY_IMPORT, f"{name_of(path)} imports {imported}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not any(isinstance(n, ast.AsyncFunctionDef | ast.Await) for n in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("now", "utcnow", "today"), f"{name_of(path)} reads a clock"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_stay_in_their_adapters(path: Path) -> None:
    module = name_of(path)
    for imported, typing_only in imports_of(path):
        places = ONLY_IN.get(imported.partition(".")[0])
        assert typing_only or places is None or module.startswith(places), f"{module} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_its_job_first(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    assert text.strip().splitlines()[0]


def test_engine_and_core_speak_no_sql() -> None:
    for name in ("feed", "recorder", "dispatcher", "upkeep", "tally"):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8").lower()
        assert "insert into" not in text
        assert "select " not in text.replace("``select ", "")


# Every request to a URL that somebody chose goes through the one guarded exchange.

CLIENTS = re.compile(
    r"""
    aiohttp\.(ClientSession|request|TCPConnector|UnixConnector|ClientWebSocketResponse)
    | (urllib\.request|http\.client|ftplib|smtplib|telnetlib|poplib|imaplib|xmlrpc|requests|httpx|httpcore|urllib3|pycurl|websockets
       |socketserver|paramiko|anyio|trio)(\.\w+)*
    | asyncio\.(open_connection|open_unix_connection)
    | socket\.(socket|create_connection|fromfd|getaddrinfo|gethostbyname|gethostbyname_ex|socketpair)
    | .*loop\w*(\(\))?\.(create_connection|create_unix_connection|sock_connect|create_datagram_endpoint|getaddrinfo)
    | (\w+\.)*(urlopen|urlretrieve|connect_ex)
    | asyncpg\.(connect|create_pool)
    | aiodns\.DNSResolver | pycares\.Channel
    | subprocess\.\w+ | asyncio\.create_subprocess_(exec|shell) | os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)
    """,
    re.VERBOSE,
)

EXCHANGE = ("hookd.net.exchange", "hookd.net.connections", "hookd.net.tunnel")
"""The client: it dials what the guard has judged, at its socket_factory, and nothing else."""

MAY_REACH_OUT = {
    ("hookd.net.resolver", "aiodns.DNSResolver"): "asks the configured or the system's name servers, nobody else",
    ("hookd.net.resolver", "socket.socket"): "a datagram socket that sends nothing, to learn this machine's own addresses",
    ("hookd.net.receiver", "aiohttp.ClientSession"): "hookd listen --forward-to: the developer's own URL, on the developer's machine",
    ("hookd.postgres.connect", "asyncpg.connect"): "PostgreSQL, as the operator configured it",
    ("hookd.postgres.connect", "asyncpg.create_pool"): "PostgreSQL, as the operator configured it",
    ("hookd.postgres.embedded", "socket.socket"): "the embedded server's Unix socket",
    ("hookd.postgres.embedded", "subprocess.run"): "the embedded server's own programs, without a shell",
    ("hookd.commands.demo", "asyncio.create_subprocess_exec"): "starts hookd itself",
    ("hookd.commands.doctor", "loop.getaddrinfo"): "looks up example.com and ipv4only.arpa, to say what DNS does",
    ("hookd.commands.inspect", "urllib.request.build_opener"): "hookd health asks the daemon at admin.listen",
    ("hookd.systemd", "socket.socket"): "systemd's notification socket",
}  # fmt: skip
"""Everything else that opens a connection, and why no stranger decides where it goes.  A new one is argued for here."""

HARMLESS = {
    "subprocess.CompletedProcess",
    "subprocess.SubprocessError",
    "urllib.request",
    "urllib.request.ProxyHandler",
}
"""Names beside the ones that act."""


def names_used(path: Path) -> set[str]:
    """Dotted names as they are used, with what ``import as`` and ``from`` renamed put back."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    real: dict[str, str] = {}
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                real[alias.asname or alias.name] = alias.name
                used.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                real[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                used.add(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            text = ast.unparse(node)
            first, dot, rest = text.partition(".")
            used.add(real.get(first, first) + dot + rest)
    return used


def reaches_out(path: Path) -> set[str]:
    """What in a module could open a connection."""
    return {name for name in names_used(path) if CLIENTS.fullmatch(name)}


def test_nothing_but_the_exchange_calls_urls() -> None:
    found = {
        (name_of(path), name)
        for path in MODULES
        if name_of(path) not in EXCHANGE
        for name in reaches_out(path) - HARMLESS
    }
    assert found - set(MAY_REACH_OUT) == set(), (
        "a client beside the exchange: use the exchange, or say why not"
    )
    assert set(MAY_REACH_OUT) - found == set(), "an exception that nobody needs any more"


def test_no_client_listens_to_the_environment() -> None:
    """Proxy variables would send requests around the guard; ``.netrc`` would add credentials."""
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "trust_env=True" not in text
        assert "urlopen" not in text, "urlopen obeys HTTP_PROXY: build_opener(ProxyHandler({})) does not"


@pytest.mark.parametrize(
    "source",
    [
        "import aiohttp\naiohttp.ClientSession()", "from aiohttp import ClientSession as S\nS()", "import aiohttp as a\na.request('GET', u)",
        "import urllib.request\nurllib.request.urlopen(u)", "from urllib.request import urlopen\nurlopen(u)",
        "from http.client import HTTPConnection", "import http.client", "import socket as s\ns.create_connection(a)",
        "import asyncio\nasync def f():\n    await asyncio.open_connection(h, p)", "from asyncio import open_connection as o",
        "import asyncio\nasync def f():\n    await asyncio.get_running_loop().create_connection(p, h)",
        "async def f(loop):\n    await loop.sock_connect(s, a)", "import subprocess\nsubprocess.run(['curl', u])", "import requests", "import httpx",
        "from aiodns import DNSResolver", "import os\nos.system('curl')",
    ],
)  # fmt: skip
def test_a_client_would_be_found(tmp_path: Path, source: str) -> None:
    (tmp_path / "module.py").write_text(source, encoding="utf-8")
    assert reaches_out(tmp_path / "module.py")
