"""The small pure parts: URLs, addresses, headers, signing, bodies, verdicts."""

from __future__ import annotations

import datetime
import json
import os
import time
from email.utils import formatdate
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from hookd.core.addresses import AddressRules, classify
from hookd.core.bodies import ThinLink, body, rfc3339
from hookd.core.composer import Composer, Wire
from hookd.core.headers import check_header, check_headers
from hookd.core.model import (
    BodyFormat,
    Delivery,
    DeliveryId,
    Endpoint,
    EndpointKey,
    EndpointState,
    Event,
    Health,
    Outcome,
    OutcomeKind,
    RetryPolicy,
    Secret,
    Verdict,
    VerdictKind,
)
from hookd.core.signing import new_secret, parse_secret, sign, verify
from hookd.core.urls import Target, UrlProblem, parse_url
from hookd.core.verdict import BY_KIND, ending, judge, retry_after
from tests.fuzzing import examples

EVENT_ID = UUID("01890a5d-ac96-774b-bcce-b302099a8057")


def event(payload: bytes = b'{"id":  1}', **named: Any) -> Event:
    return Event(EVENT_ID, "user.created", "default", payload, 1700000000.5, **named)


def delivery(attempt: int = 0, **named: Any) -> Delivery:
    return Delivery(DeliveryId(1), EndpointKey(1), event(**named), attempt, 0)


def endpoint(**named: object) -> Endpoint:
    fields: dict[str, object] = {
        "key": EndpointKey(1), "id": EVENT_ID, "tenant": "default", "url": "https://example.com/hook",
        "host": "example.com:443", "shard": 0,
    }  # fmt: skip
    return Endpoint(**(fields | named))  # type: ignore[arg-type]


# URLs.


@pytest.mark.parametrize(
    ("text", "url", "lane"),
    [
        ("https://example.com", "https://example.com/", "example.com:443"),
        ("HTTPS://EXAMPLE.com:443/a?b=c#frag", "https://example.com/a?b=c", "example.com:443"),
        ("http://example.com:8080/x", "http://example.com:8080/x", "example.com:8080"),
        (
            "https://bücher.example.com/ä",
            "https://xn--bcher-kva.example.com/%C3%A4",
            "xn--bcher-kva.example.com:443",
        ),
        ("http://[2606:4700::1111]/", "http://[2606:4700::1111]/", "[2606:4700::1111]:80"),
        ("http://93.184.216.34/", "http://93.184.216.34/", "93.184.216.34:80"),
        ("https://example.com./", "https://example.com/", "example.com:443"),
        ("http://localhost:9000/hook", "http://localhost:9000/hook", "localhost:9000"),
    ],
)
def test_urls_that_may_be_called(text: str, url: str, lane: str) -> None:
    target = parse_url(text)
    assert isinstance(target, Target), target
    assert (target.url, target.lane) == (url, lane)


@pytest.mark.parametrize(
    "text",
    [
        "", "example.com", "ftp://example.com/", "javascript:alert(1)", "https://", "https:///path",
        "https://user:pw@example.com/", "https://example.com@127.0.0.1/", "https://example.com\\@evil.com/",
        "http://127.1/", "http://0x7f000001/", "http://2130706433/", "http://017700000001/", "http://0177.0.0.1/",
        "http://127.0.0.1.:80/", "http://[::1%25eth0]/", "http://[::1/", "https://example.com:0/",
        "https://example.com:99999/", "https://example.com:22/", "https://exa mple.com/", "https://example.com/a b",
        "https://example.com/\r\nx: y", "https://example.com/\x00", "https://internal/", "https://db.internal/",
        "https://printer.local/", "https://-bad.example.com/", "https://xn--a.example.com/", "https://" + "a" * 300 + ".com/",
        "https://example.com/%zz", "https://exa%6dple.com/",
    ],
)  # fmt: skip
def test_urls_that_are_refused(text: str) -> None:
    problem = parse_url(text)
    assert isinstance(problem, UrlProblem), problem
    assert problem.reason


NAMES = ("receiver", "hooks.corp", "*.internal", ".lan")


@pytest.mark.parametrize(
    ("host", "called"),
    [
        ("receiver", True), ("RECEIVER", True), ("receiver.", True), ("hooks.corp", True), ("a.internal", True), ("a.b.internal", True),
        ("nas.lan", True), ("receiver2", False), ("x.receiver.local", False), ("x.hooks.corp", False),
        ("internal", False), ("lan", False), ("xinternal", False), ("printer.local", False), ("a.internal.local", False),
        ("-receiver", False), ("a..internal", False),
    ],
)  # fmt: skip
def test_private_names_that_are_allowed(host: str, called: bool) -> None:
    target = parse_url(f"http://{host}:9000/x", names=NAMES)
    assert isinstance(target, Target) is called, target
    assert isinstance(parse_url(f"http://{host}:9000/x"), UrlProblem)


def test_an_allowed_name_opens_nothing_but_names() -> None:
    for url in (
        "http://127.1/",
        "http://0x7f.1/",
        "http://2130706433/",
        "ftp://receiver/",
        "http://receiver:22/",
        "http://u@receiver/",
    ):
        assert parse_url(url, names=("127.1", "*.1", "2130706433", "receiver")) == parse_url(url)
    target = parse_url("http://10.0.0.1/", names=("10.0.0.1", "*.1"))
    assert isinstance(target, Target)
    assert not classify(target.host, AddressRules()).allowed


@examples(100)
@given(st.text(max_size=200))
def test_no_text_breaks_the_url_parser(text: str) -> None:
    for candidate in (text, f"http://{text}", f"https://{text}/"):
        target = parse_url(candidate)
        if isinstance(target, Target):
            assert parse_url(target.url) == target, "what was accepted is accepted again, and means the same"
            assert "\r" not in target.url
            assert target.url.isascii()


# Addresses.


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "168.63.129.16", "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1", "::ffff:8.8.8.8",
        "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1",
        "ff02::1", "2001:db8::1", "3fff::1", "5f00::1", "::8.8.8.8", "2606:4700::5efe:7f00:1", "4000::1", "not an address",
        "fe80::1%eth0",
    ],
)  # fmt: skip
def test_addresses_that_are_never_dialled(address: str) -> None:
    assert not classify(address, AddressRules()).allowed


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]
)
def test_public_addresses_may_be(address: str) -> None:
    assert classify(address, AddressRules()).allowed


def test_allow_deny_and_own() -> None:
    import ipaddress

    loopback = ipaddress.ip_network("127.0.0.0/8")
    public = ipaddress.ip_address("93.184.216.34")
    assert classify("127.0.0.1", AddressRules(allow=(loopback,))).allowed
    assert not classify("127.0.0.1", AddressRules(allow=(loopback,), deny=(loopback,))).allowed
    assert not classify("93.184.216.34", AddressRules(own=frozenset({public}))).allowed
    refused = classify("127.0.0.1", AddressRules())
    assert "127" not in refused.reason
    assert "RFC" in refused.detail


# Headers.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-a", "b\r\nx-injected: 1"), ("x-a: b\r\nc", "d"), ("", "a"), ("x a", "b"), ("x-ä", "b"), ("x-a", "ä"), ("x-a", "\x00"),
        ("host", "evil.com"), ("Content-Length", "0"), ("Transfer-Encoding", "chunked"), ("webhook-id", "x"),
        ("Webhook-Signature", "x"), ("hookd-attempt", "9"), ("proxy-authorization", "x"), ("x-a", " b"),
        ("x-a", "b\tc"), ("x-a", "\tb"),
        *((name, "x") for name in (
            "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "x_forwarded_proto", "X-Original-URL", "X-Rewrite-Url", "X-Real-IP",
            "X-Host", "Proxy", "Proxy-Connection", "X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "Signature",
            "Signature-Input", "signature_input", "Content-Digest", "Repr-Digest", "Digest", "Content-MD5", "TE", "Trailer", "Upgrade",
            "HTTP2-Settings", "Content-Encoding", "Content-Range", "Max-Forwards", "Early-Data",
        )),
    ],
)  # fmt: skip
def test_headers_that_are_refused(name: str, value: str) -> None:
    problem = check_header(name, value)
    assert problem
    assert value not in problem or len(value) < 3


def test_headers_that_may_be_set() -> None:
    assert check_headers({"authorization": "Bearer abc", "x-env": "", "User-Agent": "mine"}) is None
    near = (
        "x-signature",
        "x-hub-signature-256",
        "traceparent",
        "tracestate",
        "x-forward",
        "viaduct",
        "x-original",
        "idempotency-key",
    )
    assert check_headers(dict.fromkeys(near, "a b")) is None
    assert check_headers({f"x-{n}": "y" * 1000 for n in range(20)})


# Signing.


@given(st.binary(max_size=500), st.binary(min_size=24, max_size=64))
def test_the_official_library_accepts_what_is_signed(content: bytes, key: bytes) -> None:
    secret = new_secret(key).reveal()
    now = int(time.time())
    headers = {
        "webhook-id": str(EVENT_ID),
        "webhook-timestamp": str(now),
        "webhook-signature": sign([parse_secret(secret)], str(EVENT_ID), now, content),
    }
    assert verify(secret, headers, content, now).valid
    try:
        content.decode()
    except UnicodeDecodeError:
        return  # the library signs text only
    assert Webhook(secret).sign(str(EVENT_ID), _at(now), content.decode()) == headers["webhook-signature"]


def _at(now: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(now, datetime.UTC)


def test_two_secrets_sign_both_while_one_rotates() -> None:
    old, new = new_secret(os.urandom(32)), new_secret(os.urandom(32))
    now = int(time.time())
    keys = [parse_secret(s.reveal()) for s in (new, old)]
    headers = {
        "webhook-id": "1", "webhook-timestamp": str(now), "webhook-signature": sign(keys, "1", now, b"x"),
    }  # fmt: skip
    assert len(headers["webhook-signature"].split(" ")) == 2
    assert verify(old.reveal(), headers, b"x", now).valid
    assert verify(new.reveal(), headers, b"x", now).valid
    assert not verify(new_secret(os.urandom(32)).reveal(), headers, b"x", now).valid


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"webhook-id": None}, "lacks webhook-id"),
        ({"webhook-timestamp": "1700000000000000"}, "milliseconds"),
        ({"webhook-timestamp": "soon"}, "not a whole number"),
        ({"webhook-signature": "v2,abc"}, "no v1 signature"),
        ({"webhook-signature": "v1,abc"}, "no signature matches"),
    ],
)
def test_verify_says_what_is_wrong(change: dict[str, str | None], said: str) -> None:
    secret = new_secret(os.urandom(32)).reveal()
    now = 1700000000
    headers: dict[str, str] = {
        "webhook-id": "1", "webhook-timestamp": str(now), "webhook-signature": sign([parse_secret(secret)], "1", now, b"x"),
    }  # fmt: skip
    for name, value in change.items():
        if value is None:
            del headers[name]
        else:
            headers[name] = value
    report = verify(secret, headers, b"x", now)
    assert not report.valid
    assert said in report.explanation


def test_an_old_request_is_said_to_be_old() -> None:
    secret = new_secret(os.urandom(32)).reveal()
    headers = {
        "webhook-id": "1", "webhook-timestamp": "1700000000",
        "webhook-signature": sign([parse_secret(secret)], "1", 1700000000, b"x"),
    }  # fmt: skip
    assert "clock" in verify(secret, headers, b"x", 1700009999).explanation


@pytest.mark.parametrize(
    "text", ["", "whsec_", "whsec_!!!!", "whsec_c2hvcnQ=", "secret", "whsec_" + "A" * 200]
)
def test_bad_secrets_are_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"secret|whsec_") as raised:
        parse_secret(text)
    assert len(text) < 8 or text not in str(raised.value)


def test_secrets_do_not_show() -> None:
    secret = new_secret(b"x" * 32)
    shown = endpoint(secrets=(secret,), headers={"authorization": "Bearer hidden"})
    assert secret.reveal() not in repr(shown)
    assert "hidden" not in repr(shown)
    assert "hidden" not in repr(ThinLink("t", b"hidden", 1))


# Bodies.


def test_the_four_formats() -> None:
    assert body(event(), BodyFormat.RAW) == b'{"id":  1}'
    standard = body(event(), BodyFormat.STANDARD)
    assert standard == b'{"type":"user.created","timestamp":"2023-11-14T22:13:20.500Z","data":{"id":  1}}'
    cloud = json.loads(body(event(), BodyFormat.CLOUDEVENTS, source="shop"))
    assert cloud == {
        "specversion": "1.0", "id": str(EVENT_ID), "source": "shop", "type": "user.created",
        "time": "2023-11-14T22:13:20.500Z", "datacontenttype": "application/json", "data": {"id": 1},
    }  # fmt: skip
    thin = json.loads(
        body(event(), BodyFormat.THIN, thin=ThinLink("https://a.example/{event_id}?x=1", b"k" * 32, 60))
    )
    assert thin["id"] == str(EVENT_ID)
    assert thin["url"].startswith(f"https://a.example/{EVENT_ID}?x=1&expires=1700000060&signature=")
    with pytest.raises(ValueError, match="thin_url"):
        body(event(), BodyFormat.THIN)


def test_times_are_rfc3339() -> None:
    assert rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(1700000000.9996) == "2023-11-14T22:13:20.999Z"


def test_a_request_is_composed() -> None:
    secret = new_secret(os.urandom(32))
    composer = Composer(
        endpoint(secrets=(secret,), headers={"X-Env": "prod", "User-Agent": "mine"}),
        Wire("hookd/1", BodyFormat.STANDARD, 20, 5),
    )
    request = composer.compose(delivery(attempt=2, headers={"x-trace": "1"}), 1700000001)
    head = (request.head + request.lines).decode()
    assert head.startswith("POST /hook HTTP/1.1\r\nhost: example.com\r\n")
    assert head.endswith("\r\n\r\n")
    lines = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
    assert lines["hookd-attempt"] == "3"
    assert lines["X-Env"] == "prod"
    assert lines["x-trace"] == "1"
    assert lines["content-length"] == str(len(request.body))
    assert verify(secret.reveal(), lines, request.body, 1700000001).valid
    assert secret.reveal() not in repr(request)


# Verdicts.


def judged(outcome: Outcome, attempt: int = 0, draw: float = 0.5, **named: object) -> Verdict:
    return judge(outcome, delivery(attempt), endpoint(**named), RetryPolicy(), 1700000000, draw)


def answered(status: int, retry_after: str | None = None) -> Outcome:
    return Outcome(OutcomeKind.ANSWERED, sent=True, status=status, retry_after=retry_after)


@pytest.mark.parametrize("status", range(200, 300))
def test_any_2xx_is_delivered(status: int) -> None:
    assert judged(answered(status)).kind is VerdictKind.DELIVERED


@pytest.mark.parametrize(
    "status", [300, 301, 304, 400, 401, 403, 404, 405, 408, 409, 413, 422, 500, 501, 599]
)
def test_others_are_retried(status: int) -> None:
    verdict = judged(answered(status))
    assert (verdict.kind, verdict.delay_s, verdict.slow_lane) == (VerdictKind.RETRY, 5.0, False)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_some_ask_for_less(status: int) -> None:
    assert judged(answered(status)).slow_lane


@pytest.mark.parametrize("kind", [k for k in OutcomeKind if k is not OutcomeKind.ANSWERED])
def test_every_outcome_has_a_consequence(kind: OutcomeKind) -> None:
    assert kind in BY_KIND
    assert judged(Outcome(kind, reason="x")).kind


def test_410_disables() -> None:
    verdict = judged(answered(410))
    assert verdict.kind is VerdictKind.EXHAUSTED
    assert verdict.disable


def test_the_schedule_with_jitter_and_its_end() -> None:
    schedule = RetryPolicy().schedule_s
    for attempt, delay in enumerate(schedule):
        assert judged(answered(500), attempt, 0.0).delay_s == pytest.approx(delay * 0.8)
        assert judged(answered(500), attempt, 0.999999).delay_s == pytest.approx(delay * 1.2, rel=1e-4)
    assert judged(answered(500), len(schedule)).kind is VerdictKind.EXHAUSTED


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120), (" 120 ", 120), ("0", 0), ("-5", 0), ("1e9", 0), ("soon", 0), ("", 0),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60), ("Tuesday, 14-Nov-23 22:14:20 GMT", 60), ("Tue Nov 14 22:14:20 2023", 60),
        ("Tue, 14 Nov 2023 22:12:20 GMT", 0), ("Tue, 99 Nov 2023 22:14:20 GMT", 0), ("9" * 400, float("9" * 12)),
    ],
)  # fmt: skip
def test_retry_after(text: str, seconds: float) -> None:
    assert retry_after(text, 1700000000) == seconds


def test_retry_after_is_honoured_within_bounds() -> None:
    assert judged(answered(503, "30")).delay_s == 30
    assert judged(answered(503, "30")).hold_lane_s == 30
    assert judged(answered(503, "1")).delay_s == 5, "never earlier than the schedule"
    assert judged(answered(503, "99999999")).delay_s == 86400
    assert judged(answered(503, "99999999")).hold_lane_s == 3600
    assert judged(answered(404, "30")).hold_lane_s == 0
    assert judged(answered(429, formatdate(1700000090, usegmt=True))).delay_s == 90


def test_an_endpoint_that_only_failed_is_disabled() -> None:
    day = 86400
    assert judged(answered(500), health=Health(1700000000 - 4 * day)).disable is None
    assert (
        judged(answered(500), health=Health(1700000000 - 5 * day)).disable
        == "nothing but failures for 5 days"
    )


def test_a_retry_that_would_come_too_late_is_the_end() -> None:
    late = judge(answered(500), delivery(expires_at=1700000003.0), endpoint(), RetryPolicy(), 1700000000, 0.5)
    assert late.kind is VerdictKind.EXPIRED


def test_endings_without_an_exchange() -> None:
    now = 1700000000.0
    assert ending(delivery(), endpoint(), now) is None
    for state, kind in (
        (EndpointState.REMOVED, VerdictKind.CANCELLED),
        (EndpointState.DISABLED, VerdictKind.EXHAUSTED),
    ):
        verdict = ending(delivery(), endpoint(state=state, state_reason="by hand"), now)
        assert verdict is not None
        assert verdict.kind is kind
    expired = ending(delivery(expires_at=now - 1), endpoint(), now)
    assert expired is not None
    assert expired.kind is VerdictKind.EXPIRED


@given(
    st.sampled_from(list(OutcomeKind)),
    st.integers(100, 599),
    st.integers(0, 12),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.none(), st.text(max_size=40)),
)
def test_judging_is_total(
    kind: OutcomeKind, status: int, attempt: int, draw: float, asked: str | None
) -> None:
    outcome = Outcome(kind, status=status, retry_after=asked)
    verdict = judge(outcome, delivery(attempt), endpoint(), RetryPolicy(), 1700000000, draw)
    assert 0 <= verdict.delay_s <= 86400 * 1.2
    assert 0 <= verdict.hold_lane_s <= 3600


def test_secret_equality() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert "a" not in repr(Secret("aaa")).replace("Secret", "").replace("'***'", "")
