"""The configuration: all mistakes at once, each with its place and what would be right."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from hookd.config import Config, ConfigInvalid, duration, in_words, json_schema, load, parse, size

ROOT = Path(__file__).parent.parent

WRONG = """
[databse]
dsn = "x"
[delivery]
timeout = 20
max_inflight = 3
drain = "5 s"
max_response = 12
redirects = "sometimes"
max_in_flight = 0
format = "thin"
[limits.hosts."a.example"]
rate = "x"
rat = 3
[network]
allow = ["10.0.0.1/8"]
proxy = "proxy.internal"
[admin]
listen = "0.0.0.0:80"
[retry]
schedule = ["5s", 3]
jitter = 2.0
[log]
level = "loud"
"""


def mistakes_of(text: str, environment: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigInvalid) as raised:
        parse(text, "c.toml", environment or {})
    return [str(m) for m in raised.value.mistakes]


def test_all_mistakes_at_once_with_line_and_nearest_key() -> None:
    found = "\n".join(mistakes_of(WRONG, {"HOOKD_DELIVERY__TIMEUT": "5s", "HOOKD_X__Y": "1"}))
    for expected in (
        "c.toml:2: databse: there is no such section; did you mean database?",
        'c.toml:5: delivery.timeout: 20 is no duration; write for example "250ms", "20s", "5m", "2h" or "5d"; did you mean "20s"?',
        "c.toml:6: delivery.max_inflight: there is no such key; did you mean delivery.max_in_flight?",
        "c.toml:7: delivery.drain:",
        "c.toml:8: delivery.max_response: 12 is no size",
        "c.toml:9: delivery.redirects: 'sometimes' is not one of never, same-host, any",
        "c.toml:10: delivery.max_in_flight: expected a whole number >= 1",
        "c.toml:11: delivery.format:",
        'c.toml:13: limits.hosts."a.example".rate: expected a number, got text',
        'c.toml:14: limits.hosts."a.example".rat: there is no such key; did you mean rate?',
        "c.toml:16: network.allow: '10.0.0.1/8' is no network",
        "c.toml:17: network.proxy: only proxies of http, https and socks5 are known",
        "c.toml:19: admin.listen: 0.0.0.0 is not loopback: set admin.token_file",
        "c.toml:21: retry.schedule: 3 is no duration",
        "c.toml:22: retry.jitter: expected a number <= 1",
        "c.toml:24: log.level: 'loud' is not one of debug, info, warning, error",
        "$HOOKD_DELIVERY__TIMEUT: delivery.timeut: there is no such key; did you mean delivery.timeout?",
        "$HOOKD_X__Y: there is no section 'x'",
    ):
        assert expected in found, f"{expected}\nis not among\n{found}"


def test_what_is_not_toml_names_the_line() -> None:
    (mistake,) = mistakes_of("[delivery]\ntimeout = \n")
    assert mistake.startswith("c.toml:2: this is not TOML")


def test_the_environment_wins_and_is_named() -> None:
    loaded = parse(
        '[delivery]\ntimeout = "9s"\nmax_in_flight = 5',
        "c.toml",
        {
            "HOOKD_DELIVERY__TIMEOUT": "3s",
            "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8"]',
            "HOOKD_DATABASE__DSN": "postgresql://u:p$w@h/db",
            "HOOKD_CONFIG": "ignored",
            "HOOKD_LIMITS__RATE": "2.5",
        },
    )
    assert loaded.config.delivery.timeout == 3.0
    assert loaded.config.database.dsn == "postgresql://u:p$w@h/db"
    assert loaded.config.limits.rate == 2.5
    assert loaded.sources["delivery.timeout"] == "$HOOKD_DELIVERY__TIMEOUT"
    assert loaded.sources["delivery.max_in_flight"] == "c.toml:3"


def test_a_bad_value_of_the_environment_is_refused() -> None:
    (mistake,) = mistakes_of("", {"HOOKD_DELIVERY__TIMEOUT": "15 parsecs"})
    assert mistake.startswith("$HOOKD_DELIVERY__TIMEOUT: delivery.timeout: '15 parsecs' is no duration")


def test_limits_of_a_host_inherit() -> None:
    config = parse('[limits]\nrate = 9.0\n[limits.hosts."API.example.com"]\nconcurrency = 2', "c", {}).config
    assert config.host_limits()["api.example.com"].concurrency == 2
    assert config.host_limits()["api.example.com"].rate == 9.0
    assert config.default_limits().concurrency == 50


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("api.example.com", ""), ("api.example.com:8443", ""), ("*.example.com", ""), ("192.0.2.1:80", ""), ("[2001:db8::1]", ""),
        ("[2001:db8::1]:8443", ""), ("receiver", ""), ("db.internal", ""), ("API.Example.com", ""),
        ("*.example.com:8443", "a pattern such as"), ("*.192.0.2.1", "a pattern such as"), ("not a host", "a pattern such as"),
        ("", "a pattern such as"), ("2001:db8::1", "a pattern such as"), ("*", "a pattern such as"),
        ("bücher.example", 'write "xn--bcher-kva.example"'), ("api.example.com.", 'write "api.example.com"'),
        ("api.example.com/hook", 'write "api.example.com"'), ("*.example.com.", 'write "*.example.com"'),
        ("[2001:DB8:0::1]", 'write "[2001:db8::1]"'),
    ],
)  # fmt: skip
def test_limits_of_what_is_never_called_are_refused(host: str, said: str) -> None:
    try:
        parse(f'[limits.hosts."{host}"]\nrate = 9.0\n', "c", {})
    except ConfigInvalid as refused:
        assert said, refused
        assert said in str(refused)
    else:
        assert not said


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("20s", 20), ("5m", 300), ("2h", 7200), ("5d", 432000), ("1.5s", 1.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds
    assert duration(in_words(seconds)) == seconds


@pytest.mark.parametrize("value", ["", "5", "s", "-5s", "5 s", 5, True, None, "5w"])
def test_no_durations(value: object) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        duration(value)


def test_sizes() -> None:
    assert size("16KiB") == 16384
    assert size("1MB") == 1_000_000
    with pytest.raises(ValueError, match="is no size"):
        size("16")


def test_the_files_of_the_repository_are_right() -> None:
    loaded = load(str(ROOT / "config.toml"), {})
    assert loaded.config.network.allow == ["127.0.0.0/8", "::1/128"]
    # the one difference from the defaults, as it says itself
    import msgspec

    network = msgspec.structs.replace(loaded.config.network, allow=[])
    assert msgspec.structs.replace(loaded.config, network=network) == Config()


def test_the_documentation_has_every_key_and_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    block = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert block
    documented = tomllib.loads(block[1])
    documented["limits"].pop("hosts", None)
    config = Config()
    for section in config.__struct_fields__:
        part = getattr(config, section)
        for key in part.__struct_fields__:
            if (section, key) != ("limits", "hosts"):
                assert key in documented[section], f"{section}.{key} is not documented"
    documented["delivery"].pop("thin_url")
    assert parse(
        block[1].replace('[limits.hosts."api.example.com"]', '[limits.hosts."x.example"]'), "docs", {}
    ).config


def test_the_schema_names_every_section() -> None:
    assert set(json_schema()["$defs"]["Config"]["properties"]) == set(Config.__struct_fields__)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("192.0.2.53", True), ("2001:db8::53", True), ("127.0.0.1:5353", True), ("[::1]:5353", True),
        ("dns.example", False), ("127.0.0.1:", False), ("[::1]", False), ("127.0.0.1:123456", False),
    ],
)  # fmt: skip
def test_name_servers_are_addresses_perhaps_with_a_port(text: str, good: bool) -> None:
    given = {"HOOKD_NETWORK__NAMESERVERS": json.dumps([text])}
    if good:
        assert parse("", "c.toml", given).config.network.nameservers == [text]
    else:
        (mistake,) = mistakes_of("", given)
        assert "network.nameservers" in mistake
        assert "is no IP address" in mistake
