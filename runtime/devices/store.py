"""What lies on a device: files by their contents, sent once, and a session's own folder, where programs run.

The device needs a POSIX shell, ``sha256sum``, ``mktemp``, ``find`` and ``ls``, nothing of ours. Below ``Link.root`` are
``files/SHA256``, what any bundle needed; ``programs``, what a GPU's driver compiled; ``run.XXXXXX``, a session's links
to its files, its inputs and outputs, removed when it ends (those of sessions that were killed, after a day). What
nobody used for 30 days is removed.

What was hashed is what runs: the store belongs to the account that logs in, and nobody else can write to it, nor to a
folder above it. That is looked up before anything in it is believed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...models.locked import locked
from ..engines.engine import EngineError
from ..user_cache import lock_for
from . import limits
from .link import Link, ask, quoted

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILES, _PROGRAMS = "files", "programs"

# Who asks; mode, owner and group of the two folders in the store, of the store and of the folders above it; after a
# line with a dot where the store really lies. Names may hold anything, so that is the only one to be printed.
_LOOK = """
umask 077
mkdir -p {root}/files {root}/programs && cd {root} || exit
d=$(pwd -P)
id -u
set -f
row() {{ set -- $(ls -ldn "$1"); echo "$1 $3 $4"; }}
row files
row programs
while row "$d" && [ "$d" != {last} ] && [ "$d" != / ]; do d=${{d%/*}}; d=${{d:-/}}; done
echo .
pwd -P
"""
_OWN = 3  # of the rows: the folders that are the store's


@dataclass(frozen=True)
class _Row:
    """What `ls -ldn` says of a file: ``mode`` as drwxr-xr-x."""

    mode: str
    owner: int
    group: int

    @property
    def group_writes(self) -> bool:
        return self.mode[5] == "w"

    @property
    def others_write(self) -> bool:
        return self.mode[8] == "w"

    @property
    def sticky(self) -> bool:
        """Whether names in a folder are their owners', as in /tmp."""
        return self.mode[9] in "tT"


def _row(text: str) -> _Row:
    """Raises ValueError for what is none."""
    match = re.fullmatch(r"([bcdlps-][rwxsStTlL-]{9})[.+@]? (\d{1,10}) (\d{1,10})", text)
    if match is None:
        raise ValueError(text)
    return _Row(match[1], int(match[2]), int(match[3]))


def open_store(link: Link) -> tuple[PurePosixPath, int]:
    """Makes the store where there is none; returns where it really lies, and the account that it belongs to.

    Raises EngineError where anybody but that account, or the device's system, could exchange what is in it.
    """
    said = ask(link, _LOOK.format(root=quoted([link.root]), last=quoted([link.trusted_folder])))
    text, _, place = said.decode("utf-8", "surrogateescape").removesuffix("\n").partition("\n.\n")
    try:
        account, *rows = text.split("\n")
        found = [_row(row) for row in rows]
        number, root = int(account), PurePosixPath(place)
        if len(found) <= _OWN or not root.is_absolute():
            raise ValueError(place)
    except ValueError:
        raise EngineError(
            f"{link.name}: its answer to `id -u; ls -ldn {link.root}` is {text[:80]!r}; does a login script of it "
            "print something?"
        ) from None
    for folder, row in zip((root / _FILES, root / _PROGRAMS, root, *root.parents), found, strict=False):
        problem = _who_else_writes(link, row, number, own=folder in (root, root / _FILES, root / _PROGRAMS))
        if problem:
            raise EngineError(
                f"{link.name}: {folder} there {problem}, and what runs there could be exchanged; mend it, remove the "
                f"store ({quoted(['rm', '-r', root])}), or make ~/{link.root} a link to a folder that is yours alone"
            )
    return root, number


def _who_else_writes(link: Link, row: _Row, account: int, *, own: bool) -> str:
    """Why others could exchange what lies in a folder, "" where they cannot."""
    system, groups = range(link.system_accounts), range(1, link.system_accounts)  # group 0: containers give it to all
    if not row.mode.startswith("d"):
        return f"is no folder ({row.mode})"
    if row.owner != account and (own or row.owner not in system):
        return f"belongs to account {row.owner}, not to {account}, which logs in"
    if (row.others_write or (row.group_writes and (own or row.group not in groups))) and (own or not row.sticky):
        return f"can be written to by other accounts ({row.mode}; chmod go-w)"
    return ""


def _push(link: Link, root: PurePosixPath, account: int, files: Mapping[str, tuple[Path, str]]) -> None:
    """Brings files (name: where it lies here, its sha256) into the store.

    What is there already is checked, not sent. A file is written aside, checked and renamed, so that one that was cut
    off is never taken for whole. Raises EngineError, also where a file changed on the way or its digest is wrong.
    """
    digests = sorted({digest for _, digest in files.values()})
    if not all(_DIGEST.fullmatch(digest) for digest in digests):
        raise EngineError("a bundle's manifest holds what is no sha256; compile the bundle again")
    with locked(lock_for(f"{link.name} {root}")):
        present = _present(link, root / _FILES, account, digests)
        for source, digest in dict.fromkeys(files.values()):
            if digest not in present:
                _push_one(link, root / _FILES, source, digest)
                present.add(digest)


def _present(link: Link, folder: PurePosixPath, account: int, digests: Sequence[str]) -> set[str]:
    """Those of the digests whose file is there with just these contents, and this account's alone; they are used from
    now on."""
    script = f"cd {quoted([folder])} && set -f && for f in {quoted(digests)}; do if [ -f $f ]; then touch $f; "
    script += 'set -- $(ls -ldn $f); sum=$(sha256sum < $f); echo "$f ${sum%% *} $1 $3 $4"; fi; done'
    lines = ask(link, script).decode("utf-8", "replace").splitlines()
    return {digest for digest in digests for line in lines if _is_whole(line, digest, account)}


def _is_whole(line: str, digest: str, account: int) -> bool:
    try:
        row = _row(line.removeprefix(f"{digest} {digest} "))
    except ValueError:
        return False
    return row.mode.startswith("-") and row.owner == account and not row.group_writes and not row.others_write


def _push_one(link: Link, folder: PurePosixPath, source: Path, digest: str) -> None:
    # Of this user on this machine, so that what another sends at the same time is never mixed in.
    part = folder / f"{digest}.{_this_client()}.part"
    # From its standard input: sha256sum writes an odd file name in a form of its own. All are made executable: beside
    # the program and the libraries there is only data that nobody starts.
    script = f'p={quoted([part])}; sum=; if [ -f "$p" ] && [ ! -L "$p" ] && [ -O "$p" ]; then '
    script += f'sum=$(sha256sum < "$p") || exit; fi; if [ "${{sum%% *}}" = {digest} ]; then '
    script += f'chmod 500 "$p" && mv -f "$p" {quoted([folder / digest])}; else rm -f "$p"; echo differs; fi'
    for _ in range(2):  # what was there of an earlier try may have been spoilt
        link.send(source, part)
        if ask(link, script).strip() != b"differs":
            return
    raise EngineError(f"{link.name}: {source} arrived with other contents, twice; is the bundle whole?")


def _this_client() -> str:
    return hashlib.sha256(f"{platform.node()} {os.getuid()}".encode()).hexdigest()[:12]


class Scratch:
    """A session's folder on the device: links to ``files`` (name: where one lies here, its sha256) under their names,
    its inputs and outputs, and programs run on them.

    Raises EngineError where the device cannot be reached, its store is not safe, or a file does not arrive.
    """

    def __init__(self, link: Link, files: Mapping[str, tuple[Path, str]]) -> None:
        self._link, self._sent = link, b""
        self._inference_s = limits.SLOWEST_INFERENCE_S
        self._root, account = open_store(link)
        top = f"find {quoted([self._root])} -mindepth 1 -maxdepth 1"
        remove = "-exec rm -rf '{}' + 2>/dev/null"
        others = f"! -name {_FILES} ! -name {_PROGRAMS}"
        old = f"{top} -name 'run.*' -mtime +1 {remove}; {top} {others} -mtime +30 {remove}; "
        old += f"find {quoted([self._root / _FILES, self._root / _PROGRAMS])} -type f -mtime +30 {remove}"
        made = ask(link, f"{old}; {quoted(['mktemp', '-d', self._root / 'run.XXXXXX'])}").decode("utf-8", "replace")
        self.folder = PurePosixPath(made.removesuffix("\n"))
        if self.folder.parent != self._root or not self.folder.name.startswith("run."):
            raise EngineError(f"{link.name}: mktemp there made {str(self.folder)!r}, not a folder in {self._root}")
        self._end = weakref.finalize(self, _remove, link, self.folder, os.getpid())
        try:
            _push(link, self._root, account, files)
            self._link_to(files)
        except BaseException:
            self.close()
            raise

    def _link_to(self, files: Mapping[str, tuple[Path, str]]) -> None:
        script = []
        for name, (_, digest) in sorted(files.items()):
            place = self.folder / name
            made = f"{quoted(['mkdir', '-p', place.parent])} && "
            script.append(made + quoted(["ln", "-s", self._root / _FILES / digest, place]))
        ask(self._link, " && ".join(script or [":"]))

    def execute(
        self, words: Sequence[str], images: bytes | None, result_bytes: int, inferences: int
    ) -> tuple[subprocess.CompletedProcess[str], bytes]:
        """``Execute`` on the device. Raises EngineError where it cannot be reached or does not answer in time."""
        if not self._end.alive:
            raise EngineError(f"{self._link.name}: the engine is closed")
        source, target = self.folder / "input.bin", self.folder / "output.bin"
        if images is not None:
            self._send(images, source)
        command = [*words, *([source] if images is not None else []), *([target] if result_bytes else [])]
        programs = f"XCEPTILE_CACHE={quoted([self._root / _PROGRAMS])}"
        began = time.monotonic()
        limit_s = limits.COMMAND_S + inferences * self._inference_s
        done = self._link.shell(f"{programs} {quoted(command)}", limit_s)
        if inferences and done.returncode == 0:
            self._inference_s = limits.SLOWDOWN * (time.monotonic() - began) / inferences
        data = b""
        if result_bytes and done.returncode == 0:
            data = ask(self._link, f"cat {quoted([target])}", reply_bytes=result_bytes)
        text = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(done.args, done.returncode, *text), data

    def _send(self, images: bytes, source: PurePosixPath) -> None:
        digest = hashlib.sha256(images).digest()
        if digest == self._sent:  # the same image is timed many times
            return
        self._sent = b""
        ask(self._link, quoted(["rm", "-f", source]))
        with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
            file = Path(name) / "input.bin"
            file.write_bytes(images)
            self._link.send(file, source)
        self._sent = digest

    def close(self) -> None:
        """Removes the folder from the device; what is kept by contents stays. Where the device is gone, it is left."""
        self._end()


def _remove(link: Link, folder: PurePosixPath, process: int) -> None:
    """Also of a session that is dropped; not in a child of the process whose it is."""
    if process == os.getpid():
        with suppress(EngineError):
            link.shell(quoted(["rm", "-rf", folder]), limits.LAST_COMMAND_S)
