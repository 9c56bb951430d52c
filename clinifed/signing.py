"""Ed25519 signatures (RFC 8032), and the files of the keys.

A site signs what leaves it, an officer an increase of the budget, a coordinator a bundle, a device what it built.
"""

import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from clinifed.errors import ConfigError, PrivacyError
from clinifed.files import OWNER_ONLY

__all__ = [
    "PUBLIC_SUFFIX",
    "make_key_pair",
    "make_signing_key",
    "public_key",
    "read_signing_key",
    "sign",
    "trusted_keys",
    "verify",
]

PUBLIC_SUFFIX = ".pub"
_PUBLIC = re.compile(r"[0-9a-f]{64}\n?")

# Nothing that was signed for one purpose may serve for another.
_CONTEXT = b"clinifed\x00"


def make_signing_key(path: Path) -> Ed25519PrivateKey:
    """Make a key in ``path`` (64 hexadecimal digits, owner-only).

    Raises:
        PrivacyError: the file exists, for a key is never overwritten; or it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    _write_new(path, key.private_bytes_raw().hex(), OWNER_ONLY)
    return key


def make_key_pair(path: Path) -> Ed25519PrivateKey:
    """Make a key in ``path`` (owner-only) and its public half in ``path`` with ``.pub`` added: both, or neither.

    Raises:
        PrivacyError: one of them exists, for a key is never overwritten; or one cannot be written.
    """
    key = make_signing_key(path)
    try:
        _write_new(path.with_name(path.name + PUBLIC_SUFFIX), public_key(key), 0o644)
    except BaseException:
        path.unlink()
        raise
    return key


def _write_new(path: Path, text: str, mode: int) -> None:
    """Write one line to a file that must not exist; nothing is left where that fails."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise PrivacyError(f"{path} exists; a signing key is never overwritten, choose another path") from None
    except OSError as error:
        raise PrivacyError(f"{path}: the key cannot be written ({error.strerror})") from error
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            raise PrivacyError(f"{path}: the key cannot be written ({error.strerror})") from error
        raise


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
        raise PrivacyError(f"{path}: no signing key ({error.strerror}); make one with `clinifed keys new`") from error
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


def trusted_keys(source: Path | str) -> tuple[str, ...]:
    """Public keys to verify with.

    Args:
        source: 64 hexadecimal digits, a file ``*.pub`` that holds them, or a folder of such files.

    Raises:
        ConfigError: with every file that holds no public key; or there is none at all.
    """
    if _PUBLIC.fullmatch(str(source)) and not os.path.lexists(source):
        return (str(source).strip(),)
    path = Path(source)
    files = sorted(path.glob(f"*{PUBLIC_SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: holds no public key, no file *{PUBLIC_SUFFIX}")
    keys, problems = [], []
    for file in files:
        # A private key's file looks just the same, and must be neither taken for a public one nor shown.
        if file.suffix != PUBLIC_SUFFIX:
            problems.append(f"{file}: not a public key: 64 hexadecimal digits, or a file or folder of *.pub")
            continue
        try:
            with file.open("rb") as opened:
                text = opened.read(100).decode("ascii", "replace")
        except OSError as error:
            problems.append(f"{file}: cannot be read ({error.strerror})")
            continue
        if _PUBLIC.fullmatch(text):
            keys.append(text.strip())
        else:
            problems.append(f"{file}: not a public key, which is 64 hexadecimal digits in small letters")
    if problems:
        raise ConfigError(*problems)
    return tuple(dict.fromkeys(keys))
