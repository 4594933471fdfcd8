"""Who signed a bundle, attacked."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moon.bundle import Bundle, golden_bytes
from moon.cli import main
from moon.errors import BundleError, MissingExtraError, MoonError, UsageError
from moon.gate_calibration import calibrate_conformal
from moon.signature import SIGNATURE, sign
from tests.bundles import make_bundle
from tests.test_bundle import reseal

pytest.importorskip("cryptography")


class Keys:
    """A pair of files, as openssl writes them."""

    def __init__(self, folder: Path, name: str) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
            PublicFormat,
        )  # fmt: skip

        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub"
        key = Ed25519PrivateKey.generate()
        pem, plain = Encoding.PEM, NoEncryption()
        self.private.write_bytes(key.private_bytes(pem, PrivateFormat.PKCS8, plain))
        public = key.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo)
        self.public.write_bytes(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"), "mine")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    path = make_bundle(tmp_path_factory.mktemp("signed") / "tiny").path
    sign(path, keys.private)
    return path


@pytest.fixture
def signed(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "tiny"))


def test_what_was_signed_opens(signed: Path, keys: Keys) -> None:
    assert Bundle.open(signed, key=keys.public).manifest == Bundle.open(signed).manifest


def test_keys_of_openssl_serve(signed: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    for words in (
        ["genpkey", "-algorithm", "ed25519", "-out", private],
        ["pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    assert len(sign(signed, private)) == 64
    assert Bundle.open(signed, key=public).path == signed


def test_one_who_puts_every_hash_right_is_found_out(signed: Path, keys: Keys) -> None:
    golden = Bundle.open(signed).golden()
    pixels = golden.pop("pixels")
    reseal(signed, **{"golden.npz": golden_bytes(255 - pixels, golden)})
    Bundle.open(signed)  # by its checksums it is whole
    with pytest.raises(BundleError, match=r"the signature of .* is not of this manifest\.json"):
        Bundle.open(signed, key=keys.public)


def test_another_bundles_signature_does_not_serve(signed: Path, keys: Keys, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=1).path
    sign(other, keys.private)
    shutil.copy(other / SIGNATURE, signed / SIGNATURE)
    with pytest.raises(BundleError, match="is not of this manifest"):
        Bundle.open(signed, key=keys.public)


def test_another_key_is_named(signed: Path, keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path, "other")
    with pytest.raises(BundleError, match=r"is signed with the key [0-9a-f]{16}, and .*other"):
        Bundle.open(signed, key=other.public)
    # Who states another's fingerprint has not signed with that key.
    plain = json.loads((signed / SIGNATURE).read_text())
    sign(signed, other.private)
    forged = json.loads((signed / SIGNATURE).read_text()) | {"key": plain["key"]}
    (signed / SIGNATURE).write_text(json.dumps(forged))
    with pytest.raises(BundleError, match="is not of this manifest"):
        Bundle.open(signed, key=keys.public)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is damaged"),
        (b"[]", "is damaged"),
        (b"[" * 4000, "is damaged"),
        (b"{}", "is damaged"),
        (b"\xff", "is damaged"),
        (b'{"schema_version": 1, "algorithm": "ed25519", "key": "", "signature": "*"}', "damaged"),
        (b'{"schema_version": 1, "algorithm": "ed25519", "key": 3, "signature": ""}', "schema"),
        (b'{"schema_version": 2, "algorithm": "ed25519", "key": "", "signature": ""}', "schema"),
        (b'{"schema_version": 1, "algorithm": "none", "key": "", "signature": ""}', "schema"),
        (b" " * 5000 + b"{}", "is damaged"),
        (None, "is not signed"),
    ],
)
def test_what_is_no_signature_is_refused(
    signed: Path, keys: Keys, content: bytes | None, said: str
) -> None:
    if content is None:
        (signed / SIGNATURE).unlink()
    else:
        (signed / SIGNATURE).write_bytes(content)
    with pytest.raises(BundleError, match=said):
        Bundle.open(signed, key=keys.public)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_signature_of_another_length_is_refused(signed: Path, keys: Keys, length: int) -> None:
    plain = json.loads((signed / SIGNATURE).read_text())
    plain["signature"] = base64.b64encode(bytes(length)).decode()
    (signed / SIGNATURE).write_text(json.dumps(plain))
    with pytest.raises(BundleError, match="is not of this manifest"):
        Bundle.open(signed, key=keys.public)


def test_a_link_is_no_signature(signed: Path, keys: Keys, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.sig"
    shutil.move(signed / SIGNATURE, elsewhere)
    (signed / SIGNATURE).symlink_to(elsewhere)
    with pytest.raises(BundleError, match="is not signed"):
        Bundle.open(signed, key=keys.public)


def test_calibrating_again_leaves_it_unsigned(signed: Path, keys: Keys) -> None:
    bundle = Bundle.open(signed, key=keys.public)
    old = bundle.gate()
    assert old is not None
    gate = calibrate_conformal(old.scores, score=old.score, alpha=0.2)
    bundle.with_gate(gate)
    assert not (signed / SIGNATURE).exists()
    with pytest.raises(BundleError, match="is not signed"):
        Bundle.open(signed, key=keys.public)


def test_what_is_no_key_is_named(signed: Path, keys: Keys, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    with pytest.raises(UsageError, match=r"could not read the key .*nowhere"):
        Bundle.open(signed, key=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no public key"):
        Bundle.open(signed, key=keys.private)
    with pytest.raises(UsageError, match="holds no private key"):
        sign(signed, keys.public)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ec.pem").write_bytes(pem)
    with pytest.raises(UsageError, match=r"not of Ed25519.*openssl pkey"):
        Bundle.open(signed, key=tmp_path / "ec.pem")


def test_a_damaged_bundle_is_not_signed(signed: Path, keys: Keys) -> None:
    (signed / "gate.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"gate\.json is damaged"):
        sign(signed, keys.private)


def test_what_to_install_is_named(
    signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingExtraError, match=r"cryptography.*\[sign\]"):
        Bundle.open(signed, key=keys.public)


def test_the_commands(
    signed: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    image = tmp_path / "i.png"
    Image.new("L", (8, 8), 90).save(image)
    other = Keys(tmp_path, "other")
    assert main(["sign", str(signed), "--key", str(other.private)]) == 0
    assert "is signed with the key " in capsys.readouterr().out
    for words in (["verify", str(signed)], ["predict", str(signed), str(image)]):
        assert main([*words, "--key", str(other.public)]) == 0
        assert main([*words, "--key", str(keys.public)]) == 1
        assert "is signed with the key" in capsys.readouterr().err
    with pytest.raises(MoonError):
        Bundle.open(signed, key=keys.public)
