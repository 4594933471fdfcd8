"""Who made a bundle: an Ed25519 signature of its manifest, which holds a hash of every other file.

    manifest.sig    {"schema_version": 1, "algorithm": "ed25519", "key": ..., "signature": ...}

Checksums find damage; whoever changes a file can change them, too. A signature is made with a key
that only its maker has (RFC 8032), and is checked with another that everybody may see. Whatever
changes the manifest, such as calibrating again, leaves the bundle unsigned.

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from moon.errors import BundleError, MissingExtraError, UsageError
from moon.files import write_json

__all__ = ["SIGNATURE", "check_signature", "sign"]

SIGNATURE = "manifest.sig"
_SCHEMA_VERSION = 1
_ALGORITHM = "ed25519"
# So that a signature of something else that this key made is not one of a bundle.
_CONTEXT = b"moon bundle manifest 1\n"
_MOST_BYTES = 4096
_MAKE = "openssl genpkey -algorithm ed25519 -out private.pem"
_PUBLIC = "openssl pkey -in private.pem -pubout -out public.pem"


def sign(bundle: str | os.PathLike[str], key: str | os.PathLike[str]) -> str:
    """Sign a bundle, after all of it was verified; an old signature is replaced.

    Args:
        bundle: its folder.
        key: file of an Ed25519 private key, PEM (PKCS #8) without a password.

    Returns:
        The fingerprint of the public key, hexadecimal.

    Raises:
        UsageError: the key cannot be read, or is of another kind.
        BundleError: the bundle is damaged.
        MissingExtraError: the package cryptography is not installed.
    """
    from moon.bundle import Bundle

    private = _private(Path(key))
    path = Bundle.open(bundle).path
    data = (path / "manifest.json").read_bytes()
    fingerprint = _fingerprint(private.public_key())
    signature = {
        "schema_version": _SCHEMA_VERSION,
        "algorithm": _ALGORITHM,
        "key": fingerprint,
        "signature": base64.b64encode(private.sign(_CONTEXT + data)).decode("ascii"),
    }
    write_json(path / SIGNATURE, signature)
    return fingerprint


def check_signature(root: Path, manifest: bytes, key: str | os.PathLike[str]) -> None:
    """Check that the holder of a key signed this manifest.

    Args:
        root: the bundle's folder.
        manifest: the bytes of its manifest.json, as they will be used.
        key: file of the Ed25519 public key, PEM.

    Raises:
        BundleError: there is no signature, it is another key's, or not of this manifest.
        UsageError: the key cannot be read, or is of another kind.
        MissingExtraError: the package cryptography is not installed.
    """
    public = _public(Path(key))
    from cryptography.exceptions import InvalidSignature

    stated, signature = _read(root)
    fingerprint = _fingerprint(public)
    if stated != fingerprint:
        raise BundleError(
            f"{root} is signed with the key {stated[:16]}, and {os.fspath(key)} is "
            f"{fingerprint[:16]}",
            remedy="Take a bundle of that maker, or the right public key",
        )
    try:
        public.verify(signature, _CONTEXT + manifest)
    except InvalidSignature as error:
        raise BundleError(
            f"the signature of {root} is not of this manifest.json",
            remedy="It was changed after it was signed: take a good copy, or sign it again",
        ) from error


def _read(root: Path) -> tuple[str, bytes]:
    """The fingerprint that is stated, and the signature."""
    path = root / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{root} is not signed",
            remedy=f"moon sign {root} --key private.pem, or leave the key out",
        )
    try:
        with path.open("rb") as file:
            plain: Any = json.loads(file.read(_MOST_BYTES).decode("ascii"))
        fits = plain["schema_version"] == _SCHEMA_VERSION and plain["algorithm"] == _ALGORITHM
        stated, signature = plain["key"], base64.b64decode(plain["signature"], validate=True)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, binascii.Error) as error:
        raise BundleError(f"{path} is damaged", remedy="Sign the bundle again") from error
    if not fits or not isinstance(stated, str):
        raise BundleError(
            f"{path} is of another schema or algorithm",
            remedy="Use the moon that signed it, or sign the bundle again",
        )
    return stated, signature


def _fingerprint(public: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    raw: bytes = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


def _private(path: Path) -> Any:
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return _load(path, lambda data: load_pem_private_key(data, None), Ed25519PrivateKey, "private")


def _public(path: Path) -> Any:
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _load(path, load_pem_public_key, Ed25519PublicKey, "public")


def _load(path: Path, load: Any, kind: type, what: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    remedy = _MAKE if what == "private" else _PUBLIC
    try:
        found = load(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"could not read the key {path}: {error.strerror or error}", remedy=remedy
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{path} holds no {what} key in PEM form without a password", remedy=remedy
        ) from error
    if not isinstance(found, kind):
        raise UsageError(f"the {what} key in {path} is not of Ed25519", remedy=remedy)
    return found


def _require() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("cryptography", "sign", "a signature") from error
