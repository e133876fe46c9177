"""Memory and time of `lm_loss` beside the loss that the model computes itself.

    python tests/benchmarks/lm_memory.py [--write]

One forward and backward pass of a Llama of two layers, 2048 tokens in a row, a quarter of them
labelled. Each runs in a process of its own. Memory is the highest resident size during the second
pass, less that before it, with the gradients of the first in place; time is that of the same pass,
in seconds of CPU. `--write` puts the table into docs/benchmarks.md.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manualloop.tasks import lm_loss

DOCS = Path(__file__).parents[2] / "docs/benchmarks.md"
BEGIN, END = "<!-- lm_memory:begin -->", "<!-- lm_memory:end -->"
TOKENS, WIDTH = 2048, 128


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_of(run):
    """Return the highest resident size while something runs, less that before it."""
    before, highest, ends = resident(), [0], threading.Event()

    def watch():
        while not ends.wait(0.005):
            highest[0] = max(highest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    ends.set()
    watcher.join()
    return max(highest[0] - before, 0)


def measure(kind, vocabulary, dtype):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, **sizes)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    ids = torch.randint(vocabulary, (1, TOKENS))
    labels = torch.where(torch.arange(TOKENS) % 1024 < 768, -100, ids)
    batch = {"input_ids": ids, "labels": labels}
    losses = []

    def run():
        loss = model(**batch).loss if kind == "own" else lm_loss(model, batch)[0]
        loss.backward()
        losses.append(float(loss.detach()))

    run()
    begin = time.process_time()
    peak = peak_of(run)
    return {"peak": peak, "seconds": time.process_time() - begin, "loss": losses[0]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=3, help="kind, vocabulary, dtype: measured in this process")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.one:
        kind, vocabulary, dtype = args.one
        print(json.dumps(measure(kind, int(vocabulary), dtype)))
        return
    lines = [
        "| vocabulary | weights | the model's own loss | `lm_loss` | both losses |",
        "|---|---|---|---|---|",
    ]
    for vocabulary in (32_000, 128_000):
        for dtype in ("float32", "bfloat16"):
            found = {}
            for kind in ("own", "ours"):
                command = [sys.executable, __file__, "--one", kind, str(vocabulary), dtype]
                ran = subprocess.run(command, capture_output=True, text=True, check=True)
                found[kind] = json.loads(ran.stdout.splitlines()[-1])
            own, ours = (
                f"{one['peak'] / 2**20:.0f} MiB, {one['seconds']:.2f} s" for one in found.values()
            )
            losses = " and ".join(f"{one['loss']:.4f}" for one in found.values())
            lines.append(f"| {vocabulary:,} | {dtype} | {own} | {ours} | {losses} |")
            print(lines[-1], flush=True)
    if args.write:
        text = DOCS.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        DOCS.write_text(text[:begin] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
