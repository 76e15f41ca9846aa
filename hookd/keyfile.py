"""
Reads and extends the file of master keys: one a line, base64 of 32 bytes, newest first; ``#`` begins a comment.

It holds what a dump of the database must not, so it must not be readable by others (group-readable is let through: that is
how systemd and Kubernetes hand a service its credentials).
"""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

from hookd.core.sealing import KEY_BYTES, PLAIN, Keyring, MasterKey

HEAD = "# Master keys of hookd, newest first. Keep a copy apart from the database: without them its secrets are lost.\n"


class KeyFileProblem(Exception):
    """The file cannot be used; the message says what to do, and repeats nothing of what is in it."""


def read_keyring(path: str) -> Keyring:
    """
    The keys of a file; none for ``""``.

    Raises:
        KeyFileProblem: it cannot be used.
    """
    if not path:
        return PLAIN
    keys: list[MasterKey] = []
    for number, line in enumerate(_text(Path(path)).splitlines(), 1):
        encoded = line.partition("#")[0].strip()
        if not encoded:
            continue
        try:
            keys.append(MasterKey.of(base64.b64decode(encoded, validate=True)))
        except ValueError:
            raise KeyFileProblem(
                f"{path}:{number}: this is no master key, which is base64 of {KEY_BYTES} random bytes; "
                f"`hookd secrets new-key {path}` puts a new one in front of a good file"
            ) from None
    if not keys:
        raise KeyFileProblem(f"{path} has no key; `hookd secrets new-key {path}` makes one")
    return Keyring(tuple(keys))


def add_key(path: str, material: bytes) -> Keyring:
    """
    Put a new key in front of those of a file, which is made if there is none; returns all of them.

    The file is replaced as a whole, so that nobody reads a part of it.

    Raises:
        KeyFileProblem: it cannot be used.
    """
    file = Path(path)
    before = ""
    if file.exists():
        read_keyring(path)
        before = _text(file)
    line = base64.b64encode(material).decode("ascii") + "\n"
    fresh = file.with_name(file.name + ".new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(HEAD + line + before.removeprefix(HEAD))
            out.flush()
            os.fsync(out.fileno())
        if before:
            _same_owner(fresh, file)
        fresh.replace(file)
    except OSError as error:
        raise KeyFileProblem(f"{path} cannot be written: {error.strerror} ({fresh.name})") from None
    return read_keyring(path)


def _same_owner(fresh: Path, file: Path) -> None:
    """The daemon that could read the file before must be able to read it now."""
    was = file.stat()
    fresh.chmod(stat.S_IMODE(was.st_mode))
    if (was.st_uid, was.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(fresh, was.st_uid, was.st_gid)


def _text(file: Path) -> str:
    try:
        if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~stat.S_IRGRP:
            raise KeyFileProblem(f"{file} can be read or written by others; run: chmod 600 {file}")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise KeyFileProblem(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise KeyFileProblem(f"{file} is no text; a key is base64 of {KEY_BYTES} random bytes") from None
