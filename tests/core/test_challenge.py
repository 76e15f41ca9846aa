"""Which answers to a challenge count."""

from __future__ import annotations

import json
import os
import time
from uuid import UUID

import pytest

from hookd.core.challenge import TYPE, challenge_in, judge, request
from hookd.core.composer import Wire
from hookd.core.model import BodyFormat, Endpoint, EndpointKey, Outcome, OutcomeKind
from hookd.core.request import InvalidRequest
from hookd.core.signing import new_secret, verify

CHALLENGE = "kX3_challenge-0123456789"
SECRET = new_secret(os.urandom(32))
WIRE = Wire("hookd/test", BodyFormat.STANDARD, 20, 5)


def endpoint(url: str = "https://example.com/hook") -> Endpoint:
    return Endpoint(
        EndpointKey(1), UUID(int=1), "t", url, "example.com:443", 0, secrets=(SECRET,),
        headers={"authorization": "Bearer x"},
    )  # fmt: skip


SENT = request(endpoint(), WIRE, CHALLENGE, UUID(int=7), 1700000000)


def answered(body: str, status: int = 200, **more: object) -> Outcome:
    return Outcome(OutcomeKind.ANSWERED, status=status, body=body, url="https://example.com/hook", **more)  # type: ignore[arg-type]


def test_the_request_is_signed_and_carries_the_challenge_in_its_body_only() -> None:
    lines = dict(line.split(": ", 1) for line in SENT.lines.decode().split("\r\n") if line)
    assert verify(SECRET.reveal(), lines, SENT.body, 1700000000).valid
    assert challenge_in(SENT.body) == CHALLENGE
    assert CHALLENGE.encode() not in SENT.head + SENT.lines
    assert b"authorization: Bearer x" in SENT.head
    assert b"content-type: application/json" in SENT.head


@pytest.mark.parametrize(
    "body",
    [
        CHALLENGE,
        f"  {CHALLENGE}\r\n",
        f'"{CHALLENGE}"',
        f"'{CHALLENGE}'\n",
        json.dumps({"challenge": CHALLENGE}),
        json.dumps({"challenge": f" {CHALLENGE} "}),
        json.dumps({"ok": True, "data": {"list": [1, None, {"answer": CHALLENGE}]}}, indent=2),
        json.dumps([CHALLENGE]),
    ],
)
@pytest.mark.parametrize("status", [200, 201, 202])
def test_a_2xx_that_repeats_it_counts(body: str, status: int) -> None:
    assert judge(answered(body, status), SENT, CHALLENGE).verified


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (answered(""), "without repeating the challenge"),
        (answered(json.dumps({"challenge": CHALLENGE[:-1]})), "without repeating"),
        (answered(json.dumps({"challenge": CHALLENGE}), 404), "answered 404"),
        (answered(json.dumps({"challenge": CHALLENGE}), 302), "answered 302"),
        (Outcome(OutcomeKind.TIMEOUT, reason="no answer in time"), "no answer in time"),
        # what an echo service sends back, whole, escaped or as a part of its own document
        (answered(SENT.body.decode()), "repeats the whole request"),
        (answered(json.dumps({"data": SENT.body.decode(), "json": json.loads(SENT.body)})), "repeats the whole request"),
        (answered(f"<p>cannot handle {SENT.body.decode()}</p>"), "repeats the whole request"),
        (answered(f"you said {CHALLENGE}, did you?"), "stands somewhere"),
        (answered(json.dumps({CHALLENGE: 1})), "stands somewhere"),
        (answered("x" * 20_000 + CHALLENGE), "without repeating"),
        (answered("[" * 10_000 + CHALLENGE), "stands somewhere"),
    ],
)  # fmt: skip
def test_what_does_not_count_is_said(outcome: Outcome, said: str) -> None:
    found = judge(outcome, SENT, CHALLENGE)
    assert not found.verified
    assert said in found.reason


def test_an_answer_after_a_redirect_does_not_count() -> None:
    outcome = answered(CHALLENGE)
    outcome.url = "https://elsewhere.example.com/"
    assert "redirected" in judge(outcome, SENT, CHALLENGE).reason


def test_a_challenge_is_found_by_whoever_receives_it_and_nothing_else_is() -> None:
    for body in (
        b"",
        b"[]",
        b"{",
        TYPE.encode(),
        b'{"type": "a"}',
        f'{{"type": "{TYPE}"}}'.encode(),
        f'["{TYPE}"]'.encode(),
    ):
        assert challenge_in(body) is None


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        request(endpoint("ftp://example.com"), WIRE, CHALLENGE, UUID(int=7), int(time.time()))
