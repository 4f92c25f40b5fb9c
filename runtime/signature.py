"""Signatures of bundles: Ed25519 (RFC 8032) over the bytes of manifest.json, which holds every other file's hash.

``manifest.sig`` is the bare signature, 64 bytes, so that `openssl pkeyutl -verify -rawin` can check it, too. Keys are
PEM files as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them. Needs cryptography.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.read_file import read_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE = "manifest.sig"
_MISSING = "signatures need the package cryptography; pip install 'xceptile[sign]'"


class SignatureError(ValueError):
    """A key that cannot be used, or a signature that is not that key's."""


def load_signer(private_key: Path) -> Callable[[bytes], bytes]:
    """What signs with the key of a PEM file. Raises SignatureError."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ModuleNotFoundError as error:
        raise SignatureError(_MISSING) from error
    advice = "make one with `openssl genpkey -algorithm ed25519 -out key.pem`"
    key = _load(private_key, lambda data: load_pem_private_key(data, password=None), "private", advice)
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{private_key}: is a private key, but not of Ed25519; {advice}")
    return key.sign


def check_signature(data: bytes, signature: bytes, public_key: Path) -> None:
    """Raises SignatureError unless ``signature`` was made over ``data`` by the private half of the PEM file's key."""
    key = _load_public_key(public_key)
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data)
    except InvalidSignature as error:
        raise SignatureError(
            f"its signature is not that of {public_key}: it was changed after it was signed, or another key signed it"
        ) from error


def _load_public_key(path: Path) -> Ed25519PublicKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ModuleNotFoundError as error:
        raise SignatureError(_MISSING) from error
    advice = "`openssl pkey -in key.pem -pubout -out public.pem` writes it"
    key = _load(path, load_pem_public_key, "public", advice)
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path}: is a public key, but not of Ed25519; {advice}")
    return key


def _load(path: Path, load: Callable[[bytes], Any], what: str, advice: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load(read_file(path))
    except OSError as error:
        raise SignatureError(f"{path}: cannot be read: {error.strerror}") from error
    except TypeError as error:  # a key under a passphrase
        raise SignatureError(
            f"{path}: is encrypted; give a key without a passphrase (`openssl pkey -in {path}`)"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path}: is no {what} key in PEM form; {advice}") from error
