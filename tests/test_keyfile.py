"""The file of master keys."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

import pytest

from hookd.core.sealing import PLAIN, MasterKey
from hookd.keyfile import KeyFileProblem, add_key, read_keyring

if TYPE_CHECKING:
    from pathlib import Path


def line(material: bytes) -> str:
    return base64.b64encode(material).decode() + "\n"


def written(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_new_file_is_nobody_elses_business(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    before = os.umask(0)
    try:
        ring = add_key(str(path), b"a" * 32)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [k.id for k in ring.keys] == [MasterKey.of(b"a" * 32).id]
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_stands_first_and_comments_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "k", "# mine\n\n" + line(b"a" * 32).strip() + "  # of 2026\n", 0o640)
    ring = add_key(path, b"b" * 32)
    assert [k.id for k in ring.keys] == [MasterKey.of(m * 32).id for m in (b"b", b"a")]
    text = (tmp_path / "k").read_text()
    assert "# mine" in text
    assert "# of 2026" in text
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o640
    add_key(path, b"c" * 32)
    assert (tmp_path / "k").read_text().count("Keep a copy") == 1


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o660, 0o644])
def test_a_file_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "k", line(b"a" * 32), mode)
    with pytest.raises(KeyFileProblem, match=f"chmod 600 {path}"):
        read_keyring(path)
    with pytest.raises(KeyFileProblem, match="chmod 600"):
        add_key(path, b"b" * 32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no key"),
        ("# nothing\n", "has no key"),
        (line(b"a" * 31), ":1: this is no master key"),
        (line(b"a" * 32) + "\nhunter2hunter2\n", ":3: this is no master key"),
    ],
)
def test_what_is_wrong_is_said_and_not_repeated(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path / "k", text)
    with pytest.raises(KeyFileProblem, match=said) as raised:
        read_keyring(path)
    for secret in (line(b"a" * 31).strip(), "hunter2"):
        assert secret not in str(raised.value)


def test_no_file_means_no_keys_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    assert read_keyring("") is PLAIN
    with pytest.raises(KeyFileProblem, match="cannot be read"):
        read_keyring(str(tmp_path / "none"))
