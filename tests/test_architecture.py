"""The layers: a module imports only downwards, and keeps to what its floor may do."""

from __future__ import annotations

import ast
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
    "hookd.verification": 3,
    "hookd.logs": 4,
    "hookd.telemetry": 4,
    "hookd.daemon": 4,
    "hookd.admin": 4,
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
    "asyncpg": ("hookd.postgres", "hookd.admin", "hookd.commands"),
    "cryptography": ("hookd.core",),
    "aiodns": ("hookd.net",),
    "pycares": ("hookd.net",),
    "aiohttp": ("hookd.net", "hookd.admin"),
    "uvloop": ("hookd.commands",),
    "click": ("hookd.commands",),
    "prometheus_client": ("hookd.telemetry",),
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
    for name in ("feed", "recorder", "dispatcher", "upkeep"):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8").lower()
        assert "insert into" not in text
        assert "select " not in text.replace("``select ", "")
