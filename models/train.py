"""Train the demo network: Xception at reduced width on the drawn image set.

``python -m xceptile.models.train`` draws the training images once (build/training/images-*.npy), trains, and writes
after every epoch a line of log and a state from which the same command goes on, and in the end xception.safetensors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from .atomic_write import written_whole
from .drawn import LABELS, draw
from .preprocess import InputSpec
from .weights import save_checkpoint
from .xception import Block, Xception

LOG = "training_log.jsonl"


@dataclass(frozen=True)
class Recipe:
    """One training run. Sizes in pixels, counts in images; the learning rate is AdamW's at its plateau."""

    epochs: int = 7
    images: int = 30000
    val_images: int = 2000
    size: int = 80
    width: float = 0.25
    batch: int = 64
    learning_rate: float = 1.4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    warmup_steps: int = 200
    decay: float = 0.4286  # share of all steps, at the end, over which the rate falls to zero
    seed: int = 1


def drawn_set(split: str, count: int, size: int, folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first ``count`` images of a split (count, size, size, 3) and their labels; then read from disk."""
    path = folder / f"images-{split}-{count}-{size}.npy"
    if not path.exists():
        images = np.empty((count, size, size, 3), np.uint8)
        with multiprocessing.get_context("fork").Pool() as pool:
            for index, image in enumerate(pool.imap(partial(_pixels, split, size), range(count), chunksize=200)):
                images[index] = image
        with written_whole(path) as file:
            np.save(file, images)
    return np.load(path, mmap_mode="r"), np.arange(count) % len(LABELS)


def _pixels(split: str, size: int, index: int) -> NDArray[np.uint8]:
    return draw(split, index, size)[0]


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Warm-up, plateau, then a straight line to zero: the run can be prolonged while it is on the plateau."""
    falling = (steps - step) / max(1.0, steps * recipe.decay)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, falling)


def batches(
    images: NDArray[np.uint8], labels: NDArray[np.int64], size: int, rng: np.random.Generator, part: slice
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, whole batches only, of each the part of one process, as (batch, 3, H, W) float32 in
    -1..1. Each holds all four quarter turns; no mirroring, which would make one tetromino of another.
    """
    order = rng.permutation(len(images))
    for start in range(0, len(order) - size + 1, size):
        chosen = np.sort(order[start : start + size][part])
        pixels = images[chosen]
        for turns in range(1, 4):
            pixels[turns::4] = np.rot90(pixels[turns::4], turns, (1, 2))
        yield _normalized(pixels), torch.from_numpy(labels[chosen])


def _normalized(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def top1(model: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64], batch: int = 100) -> float:
    """Share of images whose largest logit is the label's, in float32."""
    model.eval()
    with torch.inference_mode():
        hits = [
            int((model(_normalized(images[i : i + batch])).argmax(1).numpy() == labels[i : i + batch]).sum())
            for i in range(0, len(images), batch)
        ]
    return sum(hits) / len(images)


def train(recipe: Recipe, folder: Path, processes: int) -> None:
    """Run a recipe to its end, going on from ``folder`` where an earlier run stopped.

    Each process computes its part of every batch on one thread, and the gradients are averaged: where other programs
    share the machine, this is several times as fast as threads, which wait for each other in every layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", recipe.images), ("val", recipe.val_images)):
        drawn_set(split, count, recipe.size, folder)
    meeting = folder / f"meeting-{os.getpid()}"
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_work, args=(recipe, folder, rank, processes, meeting)) for rank in range(processes)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()
        meeting.unlink(missing_ok=True)
    if any(worker.exitcode for worker in workers):
        raise SystemExit("training stopped; the same command goes on from the last epoch")


def _work(recipe: Recipe, folder: Path, rank: int, processes: int, meeting: Path) -> None:
    """One process of a run; the first one writes the log and the state."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=processes)
    images, labels = drawn_set("train", recipe.images, recipe.size, folder)
    val_images, val_labels = drawn_set("val", recipe.val_images, recipe.size, folder)
    torch.manual_seed(recipe.seed)
    model = Xception(len(LABELS), width=recipe.width)
    for block in model.blocks:
        norm = block.norms[-1] if isinstance(block, Block) and block.pool is None else None
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.zeros_(norm.weight)  # the middle flow starts as an identity: Goyal et al. 2017, 5.1
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate)
    loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    state_path, done = folder / "state.pt", 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = int(state["epochs"])
    parameters = list(model.parameters())
    part = slice(rank, None, processes)
    steps_an_epoch = recipe.images // recipe.batch
    for epoch in range(done, recipe.epochs):
        began, losses = time.monotonic(), []
        model.train()
        rng = np.random.default_rng((recipe.seed, epoch))
        for index, (x, y) in enumerate(batches(images, labels, recipe.batch, rng, part)):
            rate = learning_rate(epoch * steps_an_epoch + index, recipe.epochs * steps_an_epoch, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model(x.contiguous(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            _average_gradients(parameters, processes)
            optimizer.step()
            losses.append(loss.item())
            if rank == 0 and index % 50 == 0:
                print(f"epoch {epoch + 1} step {index} loss {np.mean(losses[-50:]):.3f}", flush=True)
        if rank:
            continue
        entry = {
            "epoch": epoch + 1,
            "learning_rate": round(rate, 7),
            "train_loss": round(float(np.mean(losses)), 4),
            "val_top1": top1(model, val_images, val_labels),
            "seconds": round(time.monotonic() - began, 1),
        }
        _save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}, state_path)
        with (folder / LOG).open("a") as log:
            log.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)
    distributed.destroy_process_group()


def _average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]) / processes
    distributed.all_reduce(flat)
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view(gradient.shape))
        offset += gradient.numel()


def export(recipe: Recipe, folder: Path, path: Path) -> None:
    """Write the network of the last epoch in ``folder`` as a checkpoint with its labels and where it comes from."""
    entry = json.loads((folder / LOG).read_text().splitlines()[-1])
    model = Xception(len(LABELS), width=recipe.width)
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["model"])
    provenance = {
        "kind": "Xception, trained by xceptile.models.train",
        "data": f"drawn set, {recipe.images} images of the train split",
        "epochs": str(entry["epoch"]),
        "val_top1": f"{entry['val_top1']:.4f} on {recipe.val_images} drawn images of the val split, float32",
        "license": "Apache-2.0",
    }
    spec = InputSpec(recipe.size, recipe.size)
    save_checkpoint(model.eval(), path, input_spec=spec, labels=LABELS, provenance=provenance)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for convolutions and the classifier, none for batch normalizations and biases."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def _save(state: dict[str, object], path: Path) -> None:
    with written_whole(path) as file:
        torch.save(state, file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m xceptile.models.train", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/training"), help="folder for images, state and log")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    output, processes = arguments.pop("output"), arguments.pop("processes")
    recipe = Recipe(**arguments)
    train(recipe, output, processes)
    export(recipe, output, output / "xception.safetensors")


if __name__ == "__main__":
    main()
