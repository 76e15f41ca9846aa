"""
Seals secrets for storage: AES-256-GCM under a master key, as a text that says by which key.

    enc:v1:KEY ID:BASE64 OF NONCE AND CIPHERTEXT

The id of a key is derived from it, so a key file needs no more than the keys.  What a text belongs to (``context``: which
endpoint, for which purpose) is authenticated with it: moved to another row it does not open.  A random nonce of 96 bits is
good for 2**32 texts under one key (NIST SP 800-38D, 8.3); there are a few for each endpoint.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SEALED = "enc:v1:"

KEY_BYTES = 32
NONCE_BYTES = 12


class CannotOpen(ValueError):
    """A stored secret cannot be read; the message is for the operator, and says what to do."""


@dataclass(frozen=True, slots=True)
class MasterKey:
    """What secrets are encrypted with."""

    id: str
    cipher: AESGCM = field(repr=False, compare=False)

    @classmethod
    def of(cls, material: bytes) -> MasterKey:
        """
        The key of these bytes.

        Raises:
            ValueError: there are not 32 of them.
        """
        if len(material) != KEY_BYTES:
            raise ValueError(f"a master key has {KEY_BYTES} bytes, this one has {len(material)}")
        identity = hmac.digest(material, b"hookd master key id", hashlib.sha256).hex()[:12]
        return cls(identity, AESGCM(material))


@dataclass(frozen=True, slots=True)
class Keyring:
    """The master keys, newest first: the newest seals, all of them open.  Without a key secrets stay plain text."""

    keys: tuple[MasterKey, ...] = ()

    @property
    def newest(self) -> str | None:
        """The id of the key that seals; None: there is none."""
        return self.keys[0].id if self.keys else None

    def seal(self, plain: str, context: str, nonce: bytes) -> str:
        """A secret as it is to be stored; ``nonce`` is 12 random bytes, never used twice."""
        if not self.keys:
            return plain
        key = self.keys[0]
        sealed = nonce + key.cipher.encrypt(nonce, plain.encode(), context.encode())
        return f"{SEALED}{key.id}:{base64.b64encode(sealed).decode('ascii')}"

    def open(self, stored: str, context: str) -> str:
        """
        A secret as it was given; what is not sealed is returned as it is.

        Raises:
            CannotOpen: its key is not here, or it was changed.
        """
        wanted = key_of(stored)
        if wanted is None:
            return stored
        key = next((k for k in self.keys if k.id == wanted), None)
        if key is None:
            where = (
                "is not in security.master_key_file: put it back there"
                if self.keys
                else "is needed: set security.master_key_file"
            )
            raise CannotOpen(f"it is encrypted, and master key {wanted} {where}")
        try:
            sealed = base64.b64decode(stored.rpartition(":")[2], validate=True)
            return key.cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context.encode()).decode()
        except (ValueError, InvalidTag):
            raise CannotOpen(
                f"its encrypted text was changed, or is another endpoint's (master key {wanted}): give it a new one"
            ) from None


PLAIN = Keyring()
"""No keys: secrets are stored as they are."""


def key_of(stored: str) -> str | None:
    """The id of the key that a stored text is sealed under; None: it is plain."""
    return stored.removeprefix(SEALED).partition(":")[0] if stored.startswith(SEALED) else None
