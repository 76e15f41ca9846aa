"""Secrets at rest: what is sealed opens where it belongs, under the key that it names, and nowhere else."""

from __future__ import annotations

import base64
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookd.core.sealing import PLAIN, CannotOpen, Keyring, MasterKey, key_of

OLD, NEW = MasterKey.of(b"o" * 32), MasterKey.of(b"n" * 32)


@given(st.text(max_size=200), st.text(max_size=50), st.binary(min_size=12, max_size=12))
@settings(max_examples=100)
def test_what_is_sealed_opens(plain: str, context: str, nonce: bytes) -> None:
    ring = Keyring((NEW, OLD))
    sealed = ring.seal(plain, context, nonce)
    assert key_of(sealed) == NEW.id
    assert ring.open(sealed, context) == plain
    assert len(plain) < 6 or plain not in sealed


def test_the_newest_key_seals_and_all_of_them_open() -> None:
    before = Keyring((OLD,)).seal("secret", "a/signing", os.urandom(12))
    assert Keyring((NEW, OLD)).open(before, "a/signing") == "secret"
    with pytest.raises(CannotOpen, match=rf"master key {OLD.id} is not in security\.master_key_file"):
        Keyring((NEW,)).open(before, "a/signing")
    with pytest.raises(CannotOpen, match=rf"master key {OLD.id} is needed: set security\.master_key_file"):
        PLAIN.open(before, "a/signing")


def test_another_endpoints_or_another_purposes_does_not_open() -> None:
    ring = Keyring((NEW,))
    sealed = ring.seal("secret", "a/signing", os.urandom(12))
    for context in ("b/signing", "a/headers"):
        with pytest.raises(CannotOpen, match="another endpoint's"):
            ring.open(sealed, context)


def test_every_changed_bit_is_noticed() -> None:
    ring = Keyring((NEW,))
    sealed = ring.seal("secret", "a/signing", os.urandom(12))
    head, _, encoded = sealed.rpartition(":")
    raw = bytearray(base64.b64decode(encoded))
    for place in range(len(raw)):
        raw[place] ^= 1
        with pytest.raises(CannotOpen, match="was changed"):
            ring.open(f"{head}:{base64.b64encode(raw).decode()}", "a/signing")
        raw[place] ^= 1
    for broken in (f"{head}:", f"{head}:!!", head, "enc:v1:", f"enc:v1:{NEW.id}:AAAA"):
        with pytest.raises(CannotOpen):
            ring.open(broken, "a/signing")


def test_without_a_key_everything_stays_plain() -> None:
    assert PLAIN.seal("secret", "a/signing", b"") == "secret"
    assert PLAIN.newest is None
    assert Keyring((NEW,)).open("whsec_plain", "a/signing") == "whsec_plain"
    assert key_of("whsec_plain") is None


def test_keys_do_not_show() -> None:
    assert "nnnn" not in repr(Keyring((NEW,)))
    with pytest.raises(ValueError, match="32 bytes"):
        MasterKey.of(b"short")
