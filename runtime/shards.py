"""`verify` over large sets: images in shards, over several processes or a Ray cluster, and taken up where it stopped.

Every shard is computed by a process with one BLAS thread, so that its floats do not depend on how many processes there
are. Finished shards are appended to a results file, one line an image; a file of another bundle, data set or choice of
engines is refused. What is complete in it is not computed again, and the figures are those of one uninterrupted run.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from ..models.datasets import Dataset, Item, open_dataset
from ..models.read_file import LIST_BYTES, read_file
from .accuracy import Accuracy, ImageResult, Labelled, data_sha256, result_from_json, result_to_json
from .bundle import Bundle, BundleError, open_bundle
from .engines.engine import EngineError
from .evaluate_engines import REHEARSED_IMAGES, SUB_BATCH, Contender, Networks, accuracies, contenders, judge_group
from .session import place

FORMAT = 1
SHARD = 4 * SUB_BATCH  # images of one piece of work
ONE_BLAS_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class ResultsError(ValueError):
    """A results file that belongs to something else. ``path`` is the file."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


@dataclass(frozen=True)
class Job:
    """What is to be verified: ``engines`` of a bundle, in the order in which they are reported.

    ``bundle`` and ``data`` must mean the same for every process and machine that works: it is the bundle of
    ``bundle_sha256``, and where that was ``signed``, the signature was checked.
    """

    bundle: str
    bundle_sha256: str
    data: str
    engines: tuple[str, ...]
    images: int | None = None
    device: str | None = None
    threads: int | None = None
    rehearsed_images: int | None = REHEARSED_IMAGES
    signed: bool = False

    def open_bundle(self) -> Bundle:
        """Raises BundleError, also where another bundle lies there now."""
        path = Path(self.bundle)
        opened = open_bundle(path, vouched=self.bundle_sha256 if self.signed else None)
        if opened.sha256() != self.bundle_sha256:
            raise BundleError("was exchanged while it was verified; verify it again", path)
        return opened


def items_sha256(dataset: Dataset, items: Sequence[Item]) -> str:
    """Of names, labels and files' contents; a drawn image is known by its split and number."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.name}\0{item.label}\0".encode("utf-8", "surrogateescape"))
        if isinstance(item.source, Path):
            with item.source.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _opened(job: Job) -> tuple[Networks, list[Contender], Dataset]:
    """What a process needs for any shard of a job; opened once, closed when the process ends: a device elsewhere holds
    files for it."""
    bundle = job.open_bundle()
    judged = contenders(
        bundle,
        device=job.device,
        threads=job.threads,
        engines=job.engines,
        rehearsed_images=job.rehearsed_images,
    )
    for contender in judged:
        atexit.register(contender.engine.close)
    return Networks(bundle), judged, open_dataset(job.data, labels=bundle.manifest.labels)


def run_shard(job: Job, start: int) -> list[ImageResult]:
    """The results of the ``SHARD`` images from number ``start`` on."""
    networks, judged, dataset = _opened(job)
    spec = networks.bundle.manifest.input_spec
    items = dataset.items[: job.images][start : start + SHARD]
    group = [Labelled(item.name, item.label, dataset.load(item, spec)) for item in items]
    return judge_group(networks, judged, group, start)


def verify_shards(
    job: Job,
    *,
    workers: int = 1,
    results: Path | None = None,
    ray_address: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[tuple[Accuracy, ...], str]:
    """As ``evaluate``, in ``workers`` processes of this machine, or on the Ray cluster at ``ray_address`` (``local``:
    one started here for the purpose). ``progress`` is told the images done and their number.

    Raises ResultsError for a results file of something else, EngineError where an engine cannot run.
    """
    bundle = job.open_bundle()
    dataset = open_dataset(job.data, labels=bundle.manifest.labels)
    items = dataset.items[: job.images]
    place(bundle.manifest.target, job.device)  # a device that is none is said at once, not by a worker
    header = {
        "format": FORMAT,
        "bundle": bundle.sha256(),
        "data": items_sha256(dataset, items),
        "images": len(items),
        "engines": list(job.engines),
        "device": job.device,
        "rehearsed_images": job.rehearsed_images,
    }
    starts = range(0, len(items), SHARD)
    with _kept(results, header) as (found, file):
        missing = [s for s in starts if any(i not in found for i in range(s, min(s + SHARD, len(items))))]
        done = len(items) - sum(min(SHARD, len(items) - s) for s in missing)
        progress(done, len(items))
        run = _on_ray(job, missing, ray_address) if ray_address is not None else _in_processes(job, missing, workers)
        for shard in run:
            found |= {result.index: result for result in shard}
            if file is not None:
                file.write("".join(json.dumps(result_to_json(r), sort_keys=True) + "\n" for r in shard))
                file.flush()
                os.fsync(file.fileno())
            done += len(shard)
            progress(done, len(items))
    ordered = [found[index] for index in range(len(items))]
    return accuracies(bundle, job.engines, ordered), data_sha256(ordered)


@contextlib.contextmanager
def _kept(path: Path | None, header: dict[str, object]) -> Iterator[tuple[dict[int, ImageResult], TextIO | None]]:
    """What a results file holds, begun with its header where there is none, and the file to append to.

    Raises ResultsError, also while another run writes it: the lines of two would get mixed up.
    """
    if path is None:
        yield {}, None
        return
    if path.exists() and not path.is_file():
        raise ResultsError("is no plain file, from which a run could be taken up; name another", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError("is being written by another run", path) from None
        except OSError:  # a file system without locks
            pass
        if path.stat().st_size == 0:
            file.write(json.dumps(header, sort_keys=True) + "\n")
            file.flush()
        yield _load(path, header), file


def _load(path: Path, header: dict[str, object]) -> dict[int, ImageResult]:
    """What a results file holds. A line cut short at the end is dropped."""
    data = read_file(path, LIST_BYTES)
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", "replace").splitlines()
    try:
        kept = json.loads(lines[0]) if lines else None
        found = [result_from_json(json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultsError(f"is no results file, or damaged ({error}); delete it or name another", path) from error
    if kept != header:
        other = [key for key in header if not isinstance(kept, dict) or kept.get(key) != header[key]]
        raise ResultsError(f"was begun with another {', '.join(other)}; delete it or name another", path)
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return {result.index: result for result in found}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for processes started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _in_processes(job: Job, starts: Sequence[int], workers: int) -> Iterator[list[ImageResult]]:
    if not starts:
        return
    # Spawned, not forked: numpy's BLAS reads its number of threads when it is loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(starts)), mp_context=context) as pool:
        try:
            with _environment(ONE_BLAS_THREAD):
                running = [pool.submit(run_shard, job, start) for start in starts]
            for future in as_completed(running):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _on_ray(job: Job, starts: Sequence[int], address: str) -> Iterator[list[ImageResult]]:
    """Shards as Ray tasks: the bundle and the images must lie at the same paths on every node."""
    try:
        import ray
    except ImportError as error:
        raise EngineError("sharding over Ray needs the package ray: pip install 'xceptile[ray]'") from error
    if not starts:
        return
    started = not ray.is_initialized()
    if started:
        _check_ray_answers(address)
        ray.init(
            address=address,
            runtime_env={"env_vars": ONE_BLAS_THREAD},
            log_to_driver=False,
            include_dashboard=False if address == "local" else None,
        )
    try:
        task = ray.remote(run_shard)
        waiting = [task.remote(job, start) for start in starts]
        while waiting:
            ready, waiting = ray.wait(waiting)
            for reference in ready:
                yield ray.get(reference)
    finally:
        if started:
            ray.shutdown()


# What begins every HTTP/2 connection, RFC 9113 section 3.4, with an empty SETTINGS frame; the server's follows.
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def _check_ray_answers(address: str, timeout_s: float = 10.0) -> None:
    """Ray itself waits for minutes on an address where it is not. Raises EngineError where no gRPC server answers.

    ``auto`` and ``local`` name no address. Behind TLS only the connection is tried.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address  # as Ray does
    if address in ("auto", "local"):
        return
    try:
        place = urlsplit(f"//{address.removeprefix('ray://')}")
        with socket.create_connection((place.hostname or "", place.port or 0), timeout_s) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(_HTTP2_GREETING)
            header = connection.recv(9, socket.MSG_WAITALL)
    except (OSError, ValueError) as error:
        raise EngineError(f"no Ray cluster answers at {address!r} ({error}); give HOST:PORT of a Ray head") from error
    if header[3:4] != b"\4":  # the type SETTINGS
        raise EngineError(f"what answers at {address!r} is no Ray cluster; give HOST:PORT of a Ray head, often 6379")
