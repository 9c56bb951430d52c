"""Ed25519 signatures (RFC 8032): a site signs what leaves it, an officer signs an increase of the budget."""

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from clinifed.errors import PrivacyError
from clinifed.files import OWNER_ONLY

__all__ = ["make_signing_key", "public_key", "read_signing_key", "sign", "verify"]

# Nothing that was signed for one purpose may serve for another.
_CONTEXT = b"clinifed\x00"


def make_signing_key(path: Path) -> Ed25519PrivateKey:
    """Make a key in ``path`` (64 hexadecimal digits, owner-only).

    Raises:
        PrivacyError: the file exists; a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    except FileExistsError:
        raise PrivacyError(f"{path} exists; a signing key is never overwritten, choose another path") from None
    except OSError as error:
        raise PrivacyError(f"{path}: the key cannot be written ({error.strerror})") from error
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(key.private_bytes_raw().hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return key


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """The key in ``path``.

    Raises:
        PrivacyError: it is missing, damaged, or readable by others.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise PrivacyError(f"{path}: a signing key must be readable by its owner alone; say chmod 600")
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text(encoding="ascii").strip()))
    except OSError as error:
        raise PrivacyError(
            f"{path}: no signing key ({error.strerror}); make one with `clinifed privacy key`"
        ) from error
    except ValueError:
        raise PrivacyError(f"{path}: not a signing key; it holds 64 hexadecimal digits") from None


def public_key(key: Ed25519PrivateKey) -> str:
    """The public half, 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, purpose: str, digest: str) -> str:
    """Signature of ``digest`` for ``purpose``, 128 hexadecimal digits."""
    return key.sign(_CONTEXT + purpose.encode() + b"\x00" + digest.encode()).hex()


def verify(public: str, purpose: str, digest: str, signature: str) -> bool:
    """Whether ``signature`` is that of ``public`` on ``digest`` for ``purpose``; False for anything malformed."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            bytes.fromhex(signature), _CONTEXT + purpose.encode() + b"\x00" + digest.encode()
        )
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
