"""Signed bundles: what a key vouches for opens, and nothing else does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from support.bundle_files import FILES, manifest
from support.needs import requires
from support.reports import accuracy

from xceptile.compile import cli
from xceptile.runtime import bundle as bundles
from xceptile.runtime import shards
from xceptile.runtime.bundle import BundleError, open_bundle, sign_bundle, write_bundle
from xceptile.runtime.signature import SIGNATURE, SignatureError, load_signer


def write_keys(
    folder: Path, name: str, key: ed25519.Ed25519PrivateKey | x25519.X25519PrivateKey, encryption: object = None
) -> tuple[Path, Path]:
    """The PEM files of a private key and of its public half."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    sealed = encryption if isinstance(encryption, KeySerializationEncryption) else NoEncryption()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealed))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "key", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    return write_bundle(tmp_path / "b", manifest(), FILES, load_signer(keys[0])).path


def test_a_signed_bundle_opens_with_and_without_the_key(signed: Path, keys: tuple[Path, Path]) -> None:
    assert open_bundle(signed, keys[1]) == open_bundle(signed)


def test_signing_afterwards_gives_the_same_bundle(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    later = write_bundle(tmp_path / "later", manifest(), FILES).path
    sign_bundle(later, load_signer(keys[0]))
    assert (later / SIGNATURE).read_bytes() == (signed / SIGNATURE).read_bytes()
    assert sorted(p.name for p in later.iterdir()) == sorted(p.name for p in signed.iterdir())


def test_a_bundle_without_a_signature_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    plain = write_bundle(tmp_path / "b", manifest(), FILES).path
    with pytest.raises(BundleError, match="is not signed"):
        open_bundle(plain, keys[1])


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(BundleError, match="another key signed it"):
        open_bundle(signed, other)


def test_a_changed_manifest_is_refused_even_where_its_meaning_is_the_same(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    file = signed / bundles.MANIFEST
    file.write_text(file.read_text() + "\n")
    open_bundle(signed)
    with pytest.raises(BundleError, match="changed after it was signed"):
        open_bundle(signed, keys[1])


def test_a_signature_of_another_bundle_is_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "o", manifest(network="other"), FILES, load_signer(keys[0])).path
    shutil.copy(other / SIGNATURE, signed / SIGNATURE)
    with pytest.raises(BundleError, match="changed after it was signed"):
        open_bundle(signed, keys[1])


def test_every_changed_byte_of_a_signature_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    file = signed / SIGNATURE
    whole = file.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for data in (*damaged, b"", whole[:-1], whole + b"\0"):
        file.write_bytes(data)
        with pytest.raises(BundleError, match="signature"):
            open_bundle(signed, keys[1])


def test_a_file_that_nobody_signed_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    """An engine may look for a file that is not in every bundle: native/roof is run where it exists."""
    (signed / "native/roof").mkdir(parents=True)
    (signed / "native/roof/kernels.so").write_bytes(b"code")
    with pytest.raises(BundleError, match=r"not signed, 'native/roof/kernels\.so'"):
        open_bundle(signed, keys[1])


def test_a_link_in_place_of_a_folder_is_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (signed / "native").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="not signed, 'native'"):
        open_bundle(signed, keys[1])


LITERT = Path(bundles.LITERT_INT8)


@pytest.mark.parametrize("name", [bundles.MANIFEST, SIGNATURE, str(LITERT), str(LITERT.parent)])
def test_a_link_in_place_of_what_was_signed_is_refused(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """Its target would be checked, and exchanged a moment later."""
    (signed / name).rename(tmp_path / "elsewhere")
    (signed / name).symlink_to(tmp_path / "elsewhere")
    open_bundle(signed)
    with pytest.raises(BundleError, match=r"plain files only, and '.*' is a link|not signed, 'litert'"):
        open_bundle(signed, keys[1])
    with pytest.raises(BundleError, match=r"plain files only, and '.*' is a link|not signed, 'litert'"):
        sign_bundle(signed, load_signer(keys[0]))


def test_a_link_to_a_bundle_is_what_it_led_to(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(signed)
    opened = open_bundle(tmp_path / "latest", keys[1])
    (tmp_path / "latest").unlink()
    assert opened.golden()[0].size == 12


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
@pytest.mark.parametrize("name", [bundles.MANIFEST, SIGNATURE])
def test_what_is_no_plain_file_is_neither_waited_for_nor_read(
    signed: Path, keys: tuple[Path, Path], name: str, kind: str
) -> None:
    (signed / name).unlink()
    if kind == "pipe":
        os.mkfifo(signed / name)
    elif kind == "device":
        (signed / name).symlink_to("/dev/zero")
    else:
        with (signed / name).open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(BundleError, match=r"cannot be read: it (is a (pipe|device)|holds more)"):
        open_bundle(signed, keys[1])


def test_a_folder_that_cannot_be_listed_hides_nothing(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path) == signed / "golden":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BundleError, match="golden: cannot be looked through for what is not signed: Permission denied"):
        open_bundle(signed, keys[1])


def test_a_golden_file_that_nobody_signed_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "golden/tolerance").write_text("9")
    with pytest.raises(BundleError, match="not signed, 'golden/tolerance'"):
        open_bundle(signed, keys[1])
    with pytest.raises(BundleError, match="not signed, 'golden/tolerance'"):
        sign_bundle(signed, load_signer(keys[0]))


def test_a_process_that_was_killed_while_it_signed_is_cleared_up_after(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / f".{SIGNATURE}.12345.part").write_bytes(b"half")
    with pytest.raises(BundleError, match="not signed"):
        open_bundle(signed, keys[1])
    sign_bundle(signed, load_signer(keys[0]))
    open_bundle(signed, keys[1])


def test_another_process_opens_what_was_vouched_for_and_nothing_else(signed: Path, keys: tuple[Path, Path]) -> None:
    vouched = open_bundle(signed, keys[1]).sha256()
    assert open_bundle(signed, vouched=vouched).sha256() == vouched
    write_bundle(signed, manifest(network="another"), FILES)
    with pytest.raises(BundleError, match="not the bundle whose signature was checked"):
        open_bundle(signed, vouched=vouched)
    write_bundle(signed, manifest(), FILES)
    (signed / "native").mkdir()
    (signed / "native/kernels.so").write_bytes(b"code")
    with pytest.raises(BundleError, match="not signed, 'native/kernels"):
        open_bundle(signed, vouched=vouched)


def test_the_identity_is_of_what_was_checked(signed: Path, keys: tuple[Path, Path]) -> None:
    opened = open_bundle(signed, keys[1])
    before = opened.sha256()
    (signed / bundles.MANIFEST).write_text("{}")
    assert opened.sha256() == before


def test_a_damaged_bundle_is_not_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / bundles.LITERT_INT8).write_bytes(b"changed")
    with pytest.raises(BundleError, match="sha256"):
        sign_bundle(signed, load_signer(keys[0]))


@pytest.mark.parametrize("which", ["no such file", "no key", "public", "encrypted", "x25519"])
def test_a_key_that_cannot_sign_is_refused_in_one_line(tmp_path: Path, keys: tuple[Path, Path], which: str) -> None:
    encrypted = BestAvailableEncryption(b"secret")
    files = {
        "no such file": tmp_path / "none.pem",
        "no key": Path(__file__),
        "public": keys[1],
        "encrypted": write_keys(tmp_path, "e", ed25519.Ed25519PrivateKey.generate(), encrypted)[0],
        "x25519": write_keys(tmp_path, "x", x25519.X25519PrivateKey.generate())[0],
    }
    with pytest.raises(SignatureError, match=str(files[which])) as caught:
        load_signer(files[which])
    assert "\n" not in str(caught.value)


def test_a_private_key_is_no_public_one(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no public key"):
        open_bundle(signed, keys[0])
    with pytest.raises(BundleError, match="cannot be read"):
        open_bundle(signed, tmp_path / "none.pem")


def test_the_command_line_signs_and_checks(
    tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def xceptile(*arguments: object) -> int:
        return cli._invoke(cli.app, [str(argument) for argument in arguments])

    plain = write_bundle(tmp_path / "b", manifest(), FILES).path
    data = ("--data", "drawn:val:1")
    verbs: tuple[tuple[str, ...], ...] = (("inspect",), ("bench",), ("estimate",), ("verify", *data))
    verbs += (("sensitivity", *data), ("baseline", *data, "--output", "b"), ("check", *data, "--baseline", "b"))
    for verb, *arguments in verbs:
        assert xceptile(verb, plain, *arguments, "--public-key", keys[1]) == 2
        assert "is not signed" in capsys.readouterr().err
    assert xceptile("sign", plain, "--key", keys[0]) == 0
    assert xceptile("inspect", plain, "--public-key", keys[1]) == 0
    assert "signed" in capsys.readouterr().out
    assert xceptile("run", plain, "cat.jpg", "--public-key", keys[0]) == 2
    assert "no public key" in capsys.readouterr().err


def test_workers_are_told_which_bundle_was_checked(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[shards.Job] = []
    monkeypatch.setattr(shards, "verify_shards", lambda job, **_: jobs.append(job) or ((accuracy(),), ""))
    for more in (["--workers", "2"], ["--results", "r"], ["--ray", "local"]):
        for key in ([], ["--public-key", str(keys[1])]):
            cli._invoke(cli.app, ["verify", str(signed), "--data", "drawn:val:1", "--device", "local", *more, *key])
            assert (jobs[-1].bundle_sha256, jobs[-1].signed) == (open_bundle(signed).sha256(), bool(key))
    assert len(jobs) == 6


@requires("openssl", package="openssl")
def test_openssl_makes_the_keys_and_checks_the_signature(tmp_path: Path) -> None:
    """A device without Python can do it."""

    def openssl(*words: str | Path) -> int:
        return subprocess.run(["openssl", *words], cwd=tmp_path, capture_output=True, check=False).returncode

    assert openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem") == 0
    assert openssl("pkey", "-in", "key.pem", "-pubout", "-out", "public.pem") == 0
    signed = write_bundle(tmp_path / "b", manifest(), FILES, load_signer(tmp_path / "key.pem")).path
    open_bundle(signed, tmp_path / "public.pem")
    verify = ("pkeyutl", "-verify", "-pubin", "-inkey", "public.pem", "-rawin", "-sigfile", signed / SIGNATURE, "-in")
    assert openssl(*verify, signed / bundles.MANIFEST) == 0
    (tmp_path / "changed").write_text((signed / bundles.MANIFEST).read_text() + " ")
    assert openssl(*verify, tmp_path / "changed") == 1
