"""Both schemes of Standard Webhooks against published vectors and implementations that are not ours."""

from __future__ import annotations

import base64
import datetime
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nacl.exceptions
import nacl.signing
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook

from hookd.core.model import Secret
from hookd.core.signing import (
    chosen_secret,
    new_secret,
    parse_secret,
    public_key,
    sign,
    signed_before,
    verify,
)

ID, AT, BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'

# in all official libraries
SHARED = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SHARED_SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

# of the specification, and of Svix's server (test_asymmetric_key_signing)
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PRIVATE_SIGNATURE = (
    "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="
)
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="

NODE = """
const { createPublicKey, verify } = require("node:crypto")
const [key, signature, content] = process.argv.slice(1).map(a => Buffer.from(a, "base64"))
const spki = Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), key])
process.exit(verify(null, content, createPublicKey({ key: spki, format: "der", type: "spki" }), signature) ? 0 : 1)
"""


def headers(signature: str, message_id: str = ID, at: int = AT) -> dict[str, str]:
    return {"webhook-id": message_id, "webhook-timestamp": str(at), "webhook-signature": signature}


def node_accepts(public: str, signature: str, content: bytes) -> bool:
    arguments = (
        public.removeprefix("whpk_"),
        signature.removeprefix("v1a,"),
        base64.b64encode(content).decode(),
    )
    return subprocess.run(["node", "-e", NODE, *arguments], check=False, timeout=60).returncode == 0


def test_the_published_vectors() -> None:
    assert sign([parse_secret(SHARED)], ID, AT, BODY) == SHARED_SIGNATURE
    assert sign([parse_secret(PRIVATE)], ID, AT, BODY) == PRIVATE_SIGNATURE
    assert public_key(Secret(PRIVATE)) == PUBLIC
    assert public_key(Secret(SHARED)) is None


def test_the_seed_alone_is_the_same_key() -> None:
    seed = base64.b64decode(PRIVATE.removeprefix("whsk_"))[:32]
    for text in (base64.b64encode(seed).decode(), base64.b64encode(seed).decode().rstrip("=")):
        assert sign([parse_secret("whsk_" + text)], ID, AT, BODY) == PRIVATE_SIGNATURE


@pytest.mark.parametrize("checker", [PUBLIC, PUBLIC.rstrip("="), PRIVATE])
def test_verify_takes_the_public_key_or_the_whole_pair(checker: str) -> None:
    assert verify(checker, headers(PRIVATE_SIGNATURE), BODY, AT).valid
    assert not verify(checker, headers(PRIVATE_SIGNATURE), BODY + b" ", AT).valid
    other = public_key(new_secret(os.urandom(32), "ed25519"))
    assert other is not None
    assert "no signature matches" in verify(other, headers(PRIVATE_SIGNATURE), BODY, AT).explanation


@given(st.binary(max_size=300), st.binary(min_size=32, max_size=32))
@settings(max_examples=50)
def test_pynacl_makes_and_accepts_the_same_signatures(content: bytes, seed: bytes) -> None:
    secret = new_secret(seed, "ed25519")
    theirs = nacl.signing.SigningKey(seed)
    signed = signed_before(ID, AT) + content
    signature = sign([parse_secret(secret.reveal())], ID, AT, content)
    raw = base64.b64decode(signature.removeprefix("v1a,"))
    assert raw == theirs.sign(signed).signature
    theirs.verify_key.verify(signed, raw)
    with pytest.raises(nacl.exceptions.BadSignatureError):
        theirs.verify_key.verify(signed + b"x", raw)
    assert public_key(secret) == "whpk_" + base64.b64encode(bytes(theirs.verify_key)).decode()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not on PATH")
def test_node_accepts_them() -> None:
    secret = new_secret(os.urandom(32), "ed25519")
    public = public_key(secret)
    assert public is not None
    for content in (b"", b"{}", '{"a":"\u2028😀\\r\\n"}'.encode()):
        signature = sign([parse_secret(secret.reveal())], "1", AT, content)
        signed = signed_before("1", AT) + content
        assert node_accepts(public, signature, signed)
        assert not node_accepts(public, signature, signed + b" ")


def test_old_and_new_of_both_kinds_sign_while_they_rotate() -> None:
    shared, pair = new_secret(os.urandom(32)), new_secret(os.urandom(32), "ed25519")
    signature = sign([parse_secret(s.reveal()) for s in (pair, shared)], ID, AT, BODY)
    assert [entry.partition(",")[0] for entry in signature.split(" ")] == ["v1a", "v1"]
    for checker in (shared.reveal(), public_key(pair)):
        assert checker is not None
        assert verify(checker, headers(signature), BODY, AT).valid
    # the official library passes over the scheme that it does not know
    now = int(datetime.datetime.now(datetime.UTC).timestamp())
    signature = sign([parse_secret(s.reveal()) for s in (pair, shared)], ID, now, BODY)
    Webhook(shared.reveal()).verify(BODY.decode(), headers(signature, at=now))


def test_the_other_scheme_is_named() -> None:
    assert "whpk_" in verify(SHARED, headers(PRIVATE_SIGNATURE), BODY, AT).explanation
    assert "whsec_" in verify(PUBLIC, headers(SHARED_SIGNATURE), BODY, AT).explanation


@pytest.mark.parametrize("signature", ["v1a,", "v1a,!!!", "v1a,YWJj", "v1a," + "A" * 88, "v1a,é"])
def test_a_malformed_signature_is_a_wrong_one(signature: str) -> None:
    assert "no signature matches" in verify(PUBLIC, headers(signature), BODY, AT).explanation


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("whsk_" + base64.b64encode(b"x" * 31).decode(), "32 bytes"),
        ("whsk_" + base64.b64encode(b"x" * 33).decode(), "32 bytes"),
        ("whsk_" + base64.b64encode(b"x" * 64).decode(), "does not belong"),
        ("whsk_!!!!!!!!!", "base64"),
        (PUBLIC, "public key"),
        ("plain text secret", "whsec_ or whsk_"),
    ],
)
def test_what_is_no_secret_is_refused_and_not_repeated(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        parse_secret(text)
    assert text.partition("_")[2][:10] not in str(raised.value) or "_" not in text


def test_keys_do_not_show() -> None:
    for secret in (SHARED, PRIVATE):
        key = parse_secret(secret)
        assert secret.partition("_")[2][:12] not in repr(key)
        assert "b'" not in repr(key)


def test_a_given_secret_is_taken_and_its_type_must_fit() -> None:
    assert chosen_secret(None, PRIVATE, b"").reveal() == PRIVATE
    assert chosen_secret("hmac", SHARED, b"").reveal() == SHARED
    assert chosen_secret("ed25519", None, b"s" * 32).reveal().startswith("whsk_")
    with pytest.raises(ValueError, match="of type ed25519, and hmac was asked for"):
        chosen_secret("hmac", PRIVATE, b"")


DOCUMENTED = Path(__file__).parents[2] / "docs" / "receiving.md"


def snippet(language: str, name: str) -> str:
    """The code of docs/receiving.md that defines something."""
    blocks = DOCUMENTED.read_text(encoding="utf-8").split("```")[1::2]
    return next(b.partition("\n")[2] for b in blocks if b.startswith(language) and name in b)


def test_the_documented_python_checks_ours() -> None:
    place: dict[str, Any] = {}
    exec(snippet("python", "def verify_v1a"), place)  # what people will copy
    secret = new_secret(os.urandom(32), "ed25519")
    now = int(datetime.datetime.now(datetime.UTC).timestamp())
    both = [parse_secret(new_secret(os.urandom(32)).reveal()), parse_secret(secret.reveal())]
    signed = headers(sign(both, ID, now, BODY), at=now)
    assert place["verify_v1a"](public_key(secret), signed, BODY) is True
    assert place["verify_v1a"](public_key(secret), signed, BODY + b" ") is False
    assert place["verify_v1a"](PUBLIC, signed, BODY) is False
    assert place["verify_v1a"](PUBLIC, headers(PRIVATE_SIGNATURE), BODY) is False  # years old


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not on PATH")
def test_the_documented_javascript_checks_ours(tmp_path: Path) -> None:
    secret = new_secret(os.urandom(32), "ed25519")
    now = int(datetime.datetime.now(datetime.UTC).timestamp())
    signed = headers(sign([parse_secret(secret.reveal())], ID, now, BODY), at=now)
    (tmp_path / "check.mjs").write_text(
        snippet("javascript", "function verifyV1a")
        + f"""
const headers = {json.dumps(signed)}
const body = Buffer.from({json.dumps(BODY.decode())})
console.log(verifyV1a("{public_key(secret)}", headers, body), verifyV1a("{PUBLIC}", headers, body))
"""
    )
    done = subprocess.run(
        ["node", str(tmp_path / "check.mjs")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "true false\n"
