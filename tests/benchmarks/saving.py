"""What a checkpoint costs: time and memory, beside the plain writing of the same tensors.

    python tests/benchmarks/saving.py

A BERT base (110 million weights) with AdamW's two moments, 1.3 GB. The plain way is
`safetensors.torch.save_file` of the weights and of the moments, then sha256, then fsync, one after
the other. Both in turns, each in a process of its own, into the same folder; the printed time is
the median. Memory is the highest resident size during the writing, less that before it.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from manualloop import SingleDevice, TrainState, prepare_scheduler, save_checkpoint


def build() -> TrainState:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for parameter in model.parameters():  # as one update leaves it
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.rand_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    return TrainState(model, optimizer, prepare_scheduler(optimizer, num_training_steps=100))


def save_plainly(folder: Path, state: TrainState) -> None:
    moments = {
        f"{number}.{name}": tensor
        for number, entry in state.optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    for name, tensors in (("model", state.model.state_dict()), ("optimizer", moments)):
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(way: str, folder: Path, pipe) -> None:
    torch.set_num_threads(1)
    state = build()
    folder.mkdir()
    before = peak = resident()
    is_done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    if way == "manualloop":
        save_checkpoint(folder, state, strategy=SingleDevice("cpu"))
    else:
        save_plainly(folder, state)
    seconds = time.perf_counter() - started
    is_done.set()
    watcher.join()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    pipe.send((seconds, (peak - before) / 1e6, size / 1e6))


def run(way: str, directory: Path) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    folder = directory / way
    process = context.Process(target=measure, args=(way, folder, sender))
    process.start()
    result = receiver.recv()
    process.join()
    shutil.rmtree(folder)
    os.sync()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to be measured; default: a temporary one")
    args = parser.parse_args()
    results: dict[str, list[tuple[float, float, float]]] = {"plain": [], "manualloop": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for _ in range(args.repeats):
            for way in results:
                results[way].append(run(way, Path(name)))
    medians = {way: statistics.median(r[0] for r in runs) for way, runs in results.items()}
    print("| | seconds, median (range) | times plain | extra memory, MB | written, MB |")
    print("|---|---|---|---|---|")
    for way, runs in results.items():
        seconds = [r[0] for r in runs]
        print(
            f"| {way} | {medians[way]:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
            f"| {medians[way] / medians['plain']:.2f} | {max(r[1] for r in runs):.0f} "
            f"| {runs[0][2]:.0f} |"
        )


if __name__ == "__main__":
    main()
