"""How fast weights get from files in the page cache to their place in memory, and what the host holds meanwhile.

    python benchmarks/bench_load.py [--gb N] [--layout hub|fused|mistral] [--readers 1 2 4 8] [--device cpu] [--cold] [--save]

Writes a random bfloat16 Mixtral of about N GB into a temporary folder, then loads it as a run does. The peak of the
process's anonymous memory and of its mapped file pages is told apart, both from /proc/self/smaps_rollup, sampled every
5 ms by a thread; the tensors' own final place is taken off the first. File pages belong to the page cache: the kernel
takes them back at once when it needs them. The rate for a CPU second hardly depends on what else the machine does; a rate below it
means that the machine was busy. `--cold` drops the files from the page cache before each turn.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import save

from batchmix.checkpoints import layouts
from batchmix.checkpoints import loading as weights
from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.safetensors_writer import Entry, write_safetensors, write_sharded
from batchmix.models.mixtral_config import MixtralConfig

SHAPE = MixtralConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=3584, num_hidden_layers=1, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
    rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
LAYOUTS = {"hub": layouts.hub, "fused": layouts.fused, "mistral": layouts.mistral}


def save_random(folder: Path, layout: str, gigabytes: float, shard_bytes: int = 500_000_000) -> Path:
    """A checkpoint of about so many GB, in files of 0.5 GB (Mistral's in one)."""

    def entries(layers: int) -> list[Entry]:
        made = LAYOUTS[layout](replace(SHAPE, num_hidden_layers=layers))
        return [Entry(name, stored.shape, torch.bfloat16, _random(stored.shape)) for name, stored in made.items()]

    def size(layers: int) -> int:
        return sum(entry.nbytes for entry in entries(layers))

    layers = max(1, round((gigabytes * 1e9 - size(0)) / (size(1) - size(0))))
    config = replace(SHAPE, num_hidden_layers=layers)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "mistral":
        (folder / "params.json").write_text(json.dumps(config.to_mistral()))
        write_safetensors(folder / "consolidated.safetensors", entries(layers), lambda elements: None)
    else:
        (folder / "config.json").write_text(json.dumps(config.to_hf() | {"dtype": "bfloat16"}))
        write_sharded(folder, entries(layers), shard_bytes, lambda elements: None)
    return folder


def _random(shape: tuple[int, ...]) -> Any:
    def pieces() -> list[torch.Tensor]:
        one = torch.randn(shape[-1], dtype=torch.bfloat16)
        rows = torch.Size(shape).numel() // shape[-1]
        return [one] if len(shape) == 1 else [one.expand(rows, -1)]

    return pieces


class Peak:
    """The most that the process held in a block beyond what it held before, in bytes. A context manager."""

    anonymous = file = resident = 0

    def __enter__(self) -> Peak:
        self._before = self._now()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._closed.wait(0.005):
            self._look()

    def _look(self) -> None:
        anonymous, file = (now - before for now, before in zip(self._now(), self._before, strict=True))
        self.anonymous, self.file = max(self.anonymous, anonymous), max(self.file, file)
        self.resident = max(self.resident, anonymous + file)

    @staticmethod
    def _now() -> tuple[int, int]:
        """Anonymous and file pages; of smaps_rollup since the counts in status lag behind."""
        found = {}
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
            key, value, *_ = line.split()
            found[key] = int(value) * 1024
        return found["Anonymous:"], found["Rss:"] - found["Anonymous:"]


@contextmanager
def readers(count: int) -> Any:
    """With so many reader threads."""
    before = weights.fill
    weights.fill = lambda source, places, progress: before(source, places, progress, count)
    try:
        yield
    finally:
        weights.fill = before


def warm(files: tuple[Path, ...], cold: bool) -> None:
    """Bring the files into the page cache, or drop them from it."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        if cold:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, 1 << 24):
                pass
        os.close(descriptor)


def load_once(folder: Path, device: torch.device, count: int, cold: bool) -> dict[str, float]:
    """Rate in GB/s of the checkpoint's bytes, and the peaks in GB of another turn, which looking slows down."""
    checkpoint = open_checkpoint(ModelConfig(path=str(folder)))
    warm(checkpoint.files, cold)
    with readers(count):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier turns freed
        with Peak() as peak:
            loaded = weights.load_weights(checkpoint, checkpoint.dtype, device)
        place = loaded.num_bytes() if device.type == "cpu" else 0
        del loaded
        warm(checkpoint.files, cold)
        started, worked = time.perf_counter(), time.process_time()
        weights.load_weights(checkpoint, checkpoint.dtype, device)
        seconds, work = time.perf_counter() - started, time.process_time() - worked
    return {
        "gb_per_second": round(checkpoint.num_bytes() / 1e9 / seconds, 2),
        "gb_per_cpu_second": round(checkpoint.num_bytes() / 1e9 / work, 2),
        "anonymous_gb_beside_the_weights": round((peak.anonymous - place) / 1e9, 3),
        "file_gb": round(peak.file / 1e9, 3),
        "resident_gb_beside_the_weights": round((peak.resident - place) / 1e9, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--layout", choices=LAYOUTS, default="hub")
    parser.add_argument("--readers", type=int, nargs="+", default=[4])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu-load.json")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = save_random(Path(scratch, "model"), args.layout, args.gb)
        size = open_checkpoint(ModelConfig(path=str(folder))).num_bytes()
        print(
            f"{args.layout}, {size / 1e9:.2f} GB, {'from disk' if args.cold else 'from page cache'}, to {args.device}"
        )
        for count in args.readers:
            turns = [load_once(folder, torch.device(args.device), count, args.cold) for _ in range(args.turns)]
            found[f"{count} readers"] = turns
            for turn in turns:
                print(f"  {count} readers: {turn}")
    if args.save:
        save("load", {"layout": args.layout, "gb": round(size / 1e9, 2), "cold": args.cold, "turns": found})


if __name__ == "__main__":
    main()
