"""
The configuration: ``config.toml``, and ``HOOKD_SECTION__KEY`` from the environment over it.

All mistakes are found at once, each with the key's full path, the line where it stands, and the nearest key that
exists.  A value of the environment is read as one TOML value, or as plain text where it is none; nothing in the file is
replaced by variables (a secret with a ``$`` in it must stay what it is).
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import stat
import tomllib
from collections import Counter
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from hookd.core.addresses import NAT64_LENGTHS, Address, AddressRules
from hookd.core.model import HostLimits, RetryPolicy
from hookd.core.proxies import Proxy, parse_proxy
from hookd.core.urls import NUMERIC_LABEL, UrlProblem, parse_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TOKEN_LEAST = 16

ASK_AGAIN_SHARE = 0.2
"""Of ``retry.disable_after``: a verified endpoint that has failed for so long is asked again (a day, of five)."""

DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS = {"B": 1, "KB": 1000, "KiB": 1024, "MB": 1000**2, "MiB": 1024**2}
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
SIZE = re.compile(r"(\d+)(B|KB|KiB|MB|MiB)")

Duration = Annotated[float, Meta(extra={"unit": "duration"}, extra_json_schema={"type": "string", "pattern": "^[0-9.]+(ms|s|m|h|d)$"})]  # fmt: skip
Size = Annotated[int, Meta(extra={"unit": "size"}, extra_json_schema={"type": "string", "pattern": "^[0-9]+(B|KB|KiB|MB|MiB)$"})]  # fmt: skip
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(ge=0)]


class DatabaseConfig(msgspec.Struct, frozen=True):
    """``[database]``"""

    dsn: str = "embedded"
    data_dir: str = ".hookd"
    bin_dir: str = ""
    password_file: str = ""
    migrate: bool = True


class DeliveryConfig(msgspec.Struct, frozen=True):
    """``[delivery]``"""

    max_in_flight: Count = 2000
    timeout: Duration = 20.0
    connect_timeout: Duration = 5.0
    drain: Duration = 30.0
    max_response: Size = 16 * 1024
    redirects: Literal["never", "same-host", "any"] = "never"
    format: Literal["standard", "raw", "cloudevents", "thin"] = "standard"
    thin_url: str = ""


class RetryConfig(msgspec.Struct, frozen=True):
    """``[retry]``"""

    schedule: list[Duration] = msgspec.field(default_factory=lambda: list(RetryPolicy().schedule_s))
    jitter: Annotated[float, Meta(ge=0, le=1)] = 0.2
    disable_after: Duration = 5 * 86400.0


class HostConfig(msgspec.Struct, frozen=True):
    """``[limits.hosts."…"]``; what is not said there is as for every host."""

    rate: Rate | None = None
    burst: Natural | None = None
    concurrency: Natural | None = None


class LimitsConfig(msgspec.Struct, frozen=True):
    """``[limits]``"""

    rate: Rate = 0.0
    burst: Natural = 0
    concurrency: Natural = 50
    hosts: dict[str, HostConfig] = msgspec.field(default_factory=dict)


class NetworkConfig(msgspec.Struct, frozen=True):
    """``[network]``"""

    allow: list[str] = msgspec.field(default_factory=list)
    allow_names: list[str] = msgspec.field(default_factory=list)
    deny: list[str] = msgspec.field(default_factory=list)
    nat64_prefixes: list[str] = msgspec.field(default_factory=list)
    https_only: bool = False
    proxy: str = ""
    proxy_resolves: bool = False
    ca_file: str = ""
    nameservers: list[str] = msgspec.field(default_factory=list)
    hosts_file: str = ""
    search_domains: list[str] = msgspec.field(default_factory=list)


class SecurityConfig(msgspec.Struct, frozen=True):
    """``[security]``"""

    master_key_file: str = ""
    require_verification: bool = False
    unverified: Literal["wait", "skip"] = "wait"
    core_dumps: bool = False


class AdminConfig(msgspec.Struct, frozen=True):
    """``[admin]``"""

    listen: str = "127.0.0.1:8440"
    hosts: list[str] = msgspec.field(default_factory=list)
    token_file: str = ""


class RetentionConfig(msgspec.Struct, frozen=True):
    """``[retention]``"""

    attempts: Duration = 30 * 86400.0
    events: Duration = 30 * 86400.0
    dead_letters: Duration = 90 * 86400.0


class LogConfig(msgspec.Struct, frozen=True):
    """``[log]``"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(msgspec.Struct, frozen=True):
    """All of it.  Durations are in seconds, sizes in bytes."""

    database: DatabaseConfig = DatabaseConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    retry: RetryConfig = RetryConfig()
    limits: LimitsConfig = LimitsConfig()
    network: NetworkConfig = NetworkConfig()
    security: SecurityConfig = SecurityConfig()
    admin: AdminConfig = AdminConfig()
    retention: RetentionConfig = RetentionConfig()
    log: LogConfig = LogConfig()

    def needs_restart(self, fresh: Config) -> list[str]:
        """The keys of a newer configuration that differ from this one and apply only to a new process."""
        return [
            f"{section}.{key}"
            for section, keys in AT_START.items()
            for key in keys
            if getattr(getattr(fresh, section), key) != getattr(getattr(self, section), key)
        ]

    def retry_policy(self) -> RetryPolicy:
        """The retry schedule as the core knows it."""
        retry, ask_again_after_s = self.retry, self.ask_again_after_s()
        return RetryPolicy(
            tuple(retry.schedule),
            retry.jitter,
            retry.disable_after,
            inf if ask_again_after_s is None else ask_again_after_s,
        )

    def ask_again_after_s(self) -> float | None:
        """After how long of nothing but failures a verified endpoint is asked again; None: verification is not required."""
        return self.retry.disable_after * ASK_AGAIN_SHARE if self.security.require_verification else None

    def default_limits(self) -> HostLimits:
        """What every host may be sent that is not named."""
        return HostLimits(self.limits.rate, self.limits.burst, self.limits.concurrency)

    def host_limits(self) -> dict[str, HostLimits]:
        """What the named hosts and patterns may be sent."""
        base = self.limits
        return {
            name: HostLimits(
                base.rate if host.rate is None else host.rate,
                base.burst if host.burst is None else host.burst,
                base.concurrency if host.concurrency is None else host.concurrency,
            )
            for name, host in base.hosts.items()
        }

    def egress_proxy(self) -> Proxy | None:
        """The proxy that everything goes through; None: none."""
        return parse_proxy(self.network.proxy) if self.network.proxy else None

    def admin_address(self) -> tuple[str, int] | None:
        """Host and port to listen on; None when it is off."""
        return split_address(self.admin.listen) if self.admin.listen else None


SECTIONS: dict[str, type[msgspec.Struct]] = get_type_hints(Config)

AT_START = {
    "database": DatabaseConfig.__struct_fields__,
    "network": ("proxy", "proxy_resolves", "ca_file", "nameservers", "hosts_file", "search_domains"),
    "security": ("core_dumps",),
    "admin": AdminConfig.__struct_fields__,
}
"""What is read when the daemon starts, by section; SIGHUP applies the others."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong with the configuration."""

    path: str
    message: str
    where: str
    """``config.toml:12``, or the name of a variable."""

    def __str__(self) -> str:
        return f"{self.where}: {self.path}: {self.message}" if self.path else f"{self.where}: {self.message}"


class ConfigInvalid(Exception):
    """All mistakes of a configuration."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = mistakes


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where each value that is not a default came from."""

    config: Config
    file: str | None
    sources: dict[str, str]


def find_file(given: str | None, environment: Mapping[str, str]) -> Path | None:
    """The file to read: ``--config``, ``$HOOKD_CONFIG``, ``./config.toml``, ``/etc/hookd/config.toml``; None: defaults."""
    named = given or environment.get("HOOKD_CONFIG")
    if named:
        return Path(named)
    return next((p for p in (Path("config.toml"), Path("/etc/hookd/config.toml")) if p.is_file()), None)


def load(given: str | None = None, environment: Mapping[str, str] = os.environ) -> Loaded:
    """
    Read the configuration.

    Raises:
        ConfigInvalid: with every mistake that it has.
    """
    path = find_file(given, environment)
    text = ""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigInvalid([Mistake("", f"cannot be read: {reason}", str(path))]) from None
    return parse(text, str(path or "config.toml"), environment)


def parse(text: str, file: str = "config.toml", environment: Mapping[str, str] = os.environ) -> Loaded:
    """The same for a text; ``file`` names it in mistakes."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        where = f"{file}:{line[1]}" if line else file
        raise ConfigInvalid([Mistake("", f"this is not TOML: {error}", where)]) from None
    reader = _Reader(file, text)
    reader.read(document)
    reader.read_environment(environment)
    config = reader.built()
    for path, message in _nonsense(config):
        reader.refuse(path, message)
    if reader.mistakes:
        raise ConfigInvalid(reader.mistakes)
    return Loaded(config, file if text else None, reader.sources)


class _Reader:
    """Collects values and mistakes."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.mistakes: list[Mistake] = []
        self.sources: dict[str, str] = {}
        self._values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        self._lines = dict(lines_of(text))

    def refuse(self, path: str, message: str) -> None:
        where = self.sources.get(path) or self._where(path)
        self.mistakes.append(Mistake(path, message, where))

    def read(self, document: dict[str, Any]) -> None:
        for section, values in document.items():
            if section not in SECTIONS:
                self.refuse(section, "there is no such section" + nearest(section, SECTIONS))
            elif not isinstance(values, dict):
                self.refuse(section, f"is a section; write [{section}] above its keys")
            else:
                for key, value in values.items():
                    self._take(section, key, value, self._where(f"{section}.{key}"))

    def read_environment(self, environment: Mapping[str, str]) -> None:
        for name, text in environment.items():
            if not name.startswith("HOOKD_") or "__" not in name:
                continue
            section, _, key = name.removeprefix("HOOKD_").lower().partition("__")
            if section not in SECTIONS:
                self.mistakes.append(Mistake("", f"there is no section {section!r}" + nearest(section, SECTIONS), f"${name}"))  # fmt: skip
                continue
            wanted = get_type_hints(SECTIONS[section]).get(key)
            value: Any = text
            if wanted is not str:
                try:
                    value = tomllib.loads(f"value = {text}")["value"]
                except tomllib.TOMLDecodeError:
                    value = text
            self._take(section, key, value, f"${name}")

    def built(self) -> Config:
        return msgspec.structs.replace(
            Config(), **{name: kind(**self._values[name]) for name, kind in SECTIONS.items()}
        )

    def _take(self, section: str, key: str, value: Any, where: str) -> None:
        path = f"{section}.{key}"
        kinds = get_type_hints(SECTIONS[section], include_extras=True)
        if key not in kinds:
            self.mistakes.append(Mistake(path, "there is no such key" + nearest(key, kinds, section), where))
            return
        if path == "limits.hosts":
            self._take_hosts(value, where)
            return
        try:
            self._values[section][key] = converted(value, kinds[key])
        except (msgspec.ValidationError, ValueError) as error:
            self.mistakes.append(Mistake(path, plainly(str(error)), where))
            return
        self.sources[path] = where

    def _take_hosts(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            self.mistakes.append(Mistake("limits.hosts", 'write [limits.hosts."api.example.com"]', where))
            return
        hosts: dict[str, HostConfig] = {}
        kinds = get_type_hints(HostConfig, include_extras=True)
        for host, limits in value.items():
            path = f'limits.hosts."{host}"'
            if not isinstance(limits, dict):
                self.refuse(path, "is a section of its own: rate, burst, concurrency")
                continue
            taken = {}
            for key, given in limits.items():
                if key not in kinds:
                    self.refuse(f"{path}.{key}", "there is no such key" + nearest(key, kinds))
                    continue
                try:
                    taken[key] = converted(given, kinds[key])
                except msgspec.ValidationError as error:
                    self.refuse(f"{path}.{key}", plainly(str(error)))
            hosts[host.lower()] = HostConfig(**taken)
            self.sources[path] = self._where(path)
        self._values["limits"]["hosts"] = hosts

    def _where(self, path: str) -> str:
        line = self._lines.get(path)
        return f"{self.file}:{line}" if line else self.file


def lines_of(text: str) -> Iterator[tuple[str, int]]:
    """Where each key of a TOML text stands, as far as a look at its lines tells; ``changes[0].date`` in arrays of tables."""
    table, counted = "", Counter[str]()
    within = ""
    for number, line in enumerate(text.splitlines(), 1):
        if within:
            # a text of several lines may look like anything
            within = "" if within in line else within
            continue
        header = re.match(r"\s*(\[?)\[([^\[\]]+)\]", line)
        if header:
            table = header[2].strip()
            if header[1]:
                counted[table] += 1
                table = f"{table}[{counted[table] - 1}]"
            yield table, number
            continue
        key = re.match(r'\s*"?([\w\-]+)"?\s*=', line)
        if key:
            yield (f"{table}.{key[1]}" if table else key[1]), number
            within = next((q for q in ('"""', "'''") if line.count(q) == 1), "")


def converted(value: Any, kind: Any) -> Any:
    """
    A value of TOML as its type asks for it.

    Raises:
        ValueError: it is of another type, or out of range.
    """
    for meta in get_args(kind)[1:]:
        unit = (getattr(meta, "extra", None) or {}).get("unit")
        if unit == "duration":
            return duration(value)
        if unit == "size":
            return size(value)
    inner = get_args(kind)
    if get_origin(kind) is Literal and value not in inner:
        raise ValueError(f"{value!r} is not one of {', '.join(inner)}")
    if inner and getattr(kind, "__origin__", None) is list and isinstance(value, list):
        return [converted(item, inner[0]) for item in value]
    return msgspec.convert(value, kind)


def duration(value: Any) -> float:
    """
    Seconds of a text such as ``250ms``, ``20s``, ``5m``, ``2h``, ``5d``.

    Raises:
        ValueError: it is none.
    """
    match = DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        hint = (
            f'; did you mean "{value}s"?'
            if isinstance(value, int | float) and not isinstance(value, bool)
            else ""
        )
        raise ValueError(
            f'{value!r} is no duration; write for example "250ms", "20s", "5m", "2h" or "5d"{hint}'
        )
    return float(match[1]) * DURATION_UNITS[match[2]]


def size(value: Any) -> int:
    """
    Bytes of a text such as ``16KiB``.

    Raises:
        ValueError: it is none.
    """
    match = SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} is no size; write for example "512B", "16KiB" or "1MiB"')
    return int(match[1]) * SIZE_UNITS[match[2]]


def in_words(seconds: float) -> str:
    """A duration as it is written: ``20s``, ``5d``."""
    for unit in ("d", "h", "m", "s"):
        count = seconds / DURATION_UNITS[unit]
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds * 1000:g}ms"


def split_address(text: str) -> tuple[str, int]:
    """
    Host and port of ``127.0.0.1:8440`` or ``[::1]:8440``.

    Raises:
        ValueError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f'{text!r} is no address; write for example "127.0.0.1:8440", or "" for off')
    return host.strip("[]"), int(port)


def plainly(message: str) -> str:
    """What msgspec says of a wrong type, in words."""
    names = {"`str`": "text", "`int`": "a whole number", "`float`": "a number", "`bool`": "true or false",
             "`array`": "a list", "`object`": "a section", "`null`": "nothing"}  # fmt: skip
    for name, plain in names.items():
        message = message.replace(name, plain)
    message = message.replace("`float | null`", "a number").replace("`int | null`", "a whole number")
    message = re.sub(r" - at `[^`]*`$", "", message)
    return message[:1].lower() + message[1:]


def nearest(name: str, known: Mapping[str, Any], section: str = "") -> str:
    """The key that may have been meant, or which there are; the end of a sentence."""
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"; did you mean {section + '.' if section else ''}{close[0]}?"
    for other, kind in SECTIONS.items():
        if section and name in get_type_hints(kind):
            return f"; did you mean {other}.{name}?"
    return f"; there are {', '.join(known)}"


def _nonsense(config: Config) -> Iterator[tuple[str, str]]:
    """What is well formed and cannot be meant."""
    yield from _bad_network(config.network)
    yield from _bad_delivery(config.delivery)
    yield from _bad_admin(config)
    if len(config.retry.schedule) > 100:
        yield "retry.schedule", "more than 100 retries"
    for host in config.limits.hosts:
        if problem := _no_host(host):
            yield f'limits.hosts."{host}"', problem
    yield from _missing_files(config)
    dsn = config.database.dsn
    if dsn != "embedded" and not dsn.startswith(("postgresql://", "postgres://")):
        yield "database.dsn", 'write "embedded" or a URI such as "postgresql://user@host:5432/name"'


def _no_host(key: str) -> str:
    """What keeps a key of ``limits.hosts`` from ever being a lane's; empty: nothing."""
    name = key.lower()
    bare = name.removeprefix("*.")
    host, _, port = (bare, "", "") if bare.endswith("]") else bare.partition(":")
    target = parse_url(f"https://{bare}/", names=(host.removesuffix("."),))
    if isinstance(target, UrlProblem) or (bare != name and (port or target.ip is not None)):
        return 'write a host, a host and port, or a pattern such as "*.example.com"'
    right = target.lane if port else target.lane.rpartition(":")[0]
    return "" if bare == right else f'write "{name.removesuffix(bare)}{right}", as it is called'


PUBLIC_FILES = ("network.ca_file", "network.hosts_file")
"""The others hold secrets."""


def _missing_files(config: Config) -> Iterator[tuple[str, str]]:
    for path in (*PUBLIC_FILES, "database.password_file", "admin.token_file", "security.master_key_file"):
        section, key = path.split(".")
        name = getattr(getattr(config, section), key)
        if not name:
            continue
        if os.path.isfile(name):  # noqa: PTH113 - Path raises for a name that is too long
            if path == "network.ca_file":
                yield from _bad_bundle(name)
            continue
        if path in PUBLIC_FILES:
            yield path, f"there is no file {name}"
        else:
            # not repeated: it may be the secret itself, written where its file's name belongs
            hint = "; `hookd secrets new-key FILE` makes one" if path == "security.master_key_file" else ""
            yield path, f"there is no such file; write the path of a file that holds the secret{hint}"


def _bad_bundle(name: str) -> Iterator[tuple[str, str]]:
    import ssl  # noqa: PLC0415 - for few

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(name)
    except ssl.SSLError:
        yield "network.ca_file", f"{name} has no certificates; a bundle of authorities in PEM is expected"
    except OSError as error:
        yield "network.ca_file", f"{name} cannot be read: {error.strerror}"


def _bad_names(network: NetworkConfig) -> Iterator[tuple[str, str]]:
    for text in network.allow_names:
        if not ALLOWED_NAME.fullmatch(text) or NUMERIC_LABEL.fullmatch(text.rpartition(".")[2]):
            yield (
                "network.allow_names",
                f'{text!r} is no host name; write for example "receiver", "hooks.corp" or "*.internal" (addresses belong in network.allow)',
            )
    for text in network.search_domains:
        if not ALLOWED_NAME.fullmatch(text) or text.startswith(("*", ".")):
            yield "network.search_domains", f'{text!r} is no domain; write for example "corp.example.com"'


def _bad_network(network: NetworkConfig) -> Iterator[tuple[str, str]]:
    for key in ("allow", "deny"):
        for text in getattr(network, key):
            try:
                ipaddress.ip_network(text)
            except ValueError:
                yield (
                    f"network.{key}",
                    f'{text!r} is no network; write for example "10.1.0.0/16" or "127.0.0.0/8"'
                    + ("; names belong in network.allow_names" if key == "allow" else ""),
                )
    yield from _bad_names(network)
    for text in network.nat64_prefixes:
        try:
            length = ipaddress.IPv6Network(text).prefixlen
        except ValueError:
            length = 0
        if length not in NAT64_LENGTHS:
            lengths = ", ".join(map(str, NAT64_LENGTHS))
            yield (
                "network.nat64_prefixes",
                f'{text!r} is no NAT64 prefix; write an IPv6 network such as "64:ff9b::/96", its length one of {lengths}',
            )
    for text in network.nameservers:
        match = NAME_SERVER.fullmatch(text)
        try:
            ipaddress.ip_address(match["bracketed"] or match["address"] if match else text)
        except ValueError:
            yield (
                "network.nameservers",
                f'{text!r} is no IP address; write one, or with a port "192.0.2.1:5353" or "[2001:db8::1]:5353"',
            )
    yield from _bad_proxy(network)


ALLOWED_NAME = re.compile(
    r"(?:\*?\.)?[A-Za-z0-9_](?:[A-Za-z0-9_\-]*[A-Za-z0-9_])?(?:\.[A-Za-z0-9_](?:[A-Za-z0-9_\-]*[A-Za-z0-9_])?)*"
)
NAME_SERVER = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<address>[^:\[\]]+)):\d{1,5}")


def _bad_proxy(network: NetworkConfig) -> Iterator[tuple[str, str]]:
    if network.proxy:
        try:
            parse_proxy(network.proxy)
        except ValueError as problem:
            yield "network.proxy", str(problem)
    elif network.proxy_resolves:
        yield "network.proxy_resolves", "is true, but there is no network.proxy"


def _bad_delivery(delivery: DeliveryConfig) -> Iterator[tuple[str, str]]:
    for key in ("timeout", "connect_timeout"):
        if getattr(delivery, key) <= 0:
            yield f"delivery.{key}", "must be longer than nothing"
    if delivery.thin_url:
        problem = parse_url(delivery.thin_url.replace("{event_id}", "id"))
        if "{event_id}" not in delivery.thin_url:
            yield "delivery.thin_url", "must have {event_id} in it"
        elif isinstance(problem, UrlProblem) and "private" not in problem.reason:
            yield "delivery.thin_url", problem.reason
    elif delivery.format == "thin":
        yield "delivery.format", 'is "thin", which needs delivery.thin_url'


HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_])?")


def _bad_admin(config: Config) -> Iterator[tuple[str, str]]:
    if not config.admin.listen:
        return
    try:
        host, _ = split_address(config.admin.listen)
    except ValueError as problem:
        yield "admin.listen", str(problem)
        return
    for name in config.admin.hosts:
        if not HOST_NAME.fullmatch(name):
            yield (
                "admin.hosts",
                f'{name!r} is no host; write a name without scheme and port, such as "hookd.example.com"',
            )
    if not _loopback(host) and not config.admin.token_file:
        yield "admin.listen", f"{host} is not loopback: set admin.token_file, or listen on 127.0.0.1"
    file = config.admin.token_file
    # who only sends events need not be able to read the daemon's token
    if os.path.isfile(file) and os.access(file, os.R_OK):  # noqa: PTH113 - Path raises for a name that is too long
        try:
            read_token(file)
        except ConfigInvalid as problem:
            yield "admin.token_file", problem.mistakes[0].message


def read_token(file: str) -> bytes:
    """
    The token of ``admin.token_file``; nothing where none is named.

    Raises:
        ConfigInvalid: it cannot be read, is open to others, or is no token.
    """
    if not file:
        return b""
    try:
        mode = Path(file).stat().st_mode
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigInvalid([Mistake("admin.token_file", f"cannot be read: {reason}", file)]) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO) & ~stat.S_IRGRP:
        message = f"can be read or written by others; run: chmod 600 {file}"
        raise ConfigInvalid([Mistake("admin.token_file", message, file)])
    if len(token) < TOKEN_LEAST or not token.isascii() or not token.isprintable() or " " in token:
        message = f"holds no token: {TOKEN_LEAST} or more visible ASCII characters, for example of openssl rand -hex 32"
        raise ConfigInvalid([Mistake("admin.token_file", message, file)])
    return token.encode()


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_rules(network: NetworkConfig, own: frozenset[Address]) -> AddressRules:
    """What ``[network]``, which was judged when it was loaded, says about addresses."""
    return AddressRules(
        tuple(ipaddress.ip_network(text) for text in network.allow),
        tuple(ipaddress.ip_network(text) for text in network.deny),
        own,
        tuple(ipaddress.IPv6Network(text) for text in network.nat64_prefixes),
    )


def allowed_names(network: NetworkConfig) -> tuple[str, ...]:
    """The private names that may be called, as ``core.urls`` compares them."""
    return tuple(name.lower() for name in network.allow_names)


def json_schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    return msgspec.json.schema(Config)
