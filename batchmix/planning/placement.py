"""What lies on the device, what on the host, and how many rows run at once: the choice, by a cost model.

Of L layers, s have their experts on the host (E bytes each), whence they are copied once a step through a ring of two
buffers. The KV cache (k bytes a token) of T tokens is on the device, or on the host, of which two layers at a time are
on the device. With F bytes of other weights and W of workspace, what must fit is

    device    F + (L - s) E + min(2, s) E + W + T k            or  ... + 2 T k / L, the cache being on the host
    host      s E                                              or  s E + T k

B = T / c rows of c tokens run at once. A decode step takes the longest of

    link      (s E [+ B c k, the cache being on the host]) / link bandwidth
    HBM       (F + L E + B c k + what comes over the link, which is written first) / memory bandwidth
    compute   B (operations of a token and its keys) / peak

and a prefill step of P tokens likewise, without B c k. All of it goes on at once, so the longest counts: copies run on
streams of their own, and the other two are `step_cost.RooflineCost`. What does not fit the host is read from disk, which
adds its own time to the link's. What fits the device is not streamed; else that is chosen which takes least time for a
row, prompt and answer. Where nothing is streamed and the card's kernels were measured, a step takes their sum instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from batchmix.planning.cost import Footprint
from batchmix.planning.gpus import GPU
from batchmix.planning.step_cost import EFFICIENCY, RooflineCost, Step, measured_cost

BUFFERS = 2  # of streamed experts on the device: one that is computed with, one that is copied into
LINK_EFFICIENCY = 0.8  # likewise, of the data sheet's link bandwidth
DISK_BANDWIDTH = 3e9  # bytes a second assumed of a disk that weights are streamed from
RESIDENT_ROWS = 1024  # at most at once with all weights at hand: 256 for each of Mixtral's 8 experts
_STREAMED_ROWS = (64, 256, 512, 1024, 2048, 4096)  # tried where weights are streamed, and every row shares their way
MAX_NUM_SEQS = _STREAMED_ROWS[-1]


@dataclass(frozen=True)
class Machine:
    """What there is: bytes, bytes a second and operations a second, of all cards together, as they are reached."""

    device_bytes: float
    host_bytes: float
    link: float  # host to device
    hbm: float
    flops: float
    has_disk: bool = False  # whether weights may lie on disk
    card: GPU | None = None  # if it is one, and known


@dataclass(frozen=True)
class Rows:
    """A mean row: tokens of its prompt and its answer. `count`: how many there are."""

    prompt: float
    answer: float
    count: float = float("inf")

    @property
    def context(self) -> float:
        """Half of a row's answer is there on average, since rows start and end at different times."""
        return self.prompt + self.answer / 2


def assumed(longest: int) -> Rows:
    """A row before any is known, where the longest may have so many tokens."""
    return Rows(min(512, 2 * longest / 3), min(256, longest / 3))


@dataclass(frozen=True)
class Placement:
    """One choice, and what a step takes by it, in seconds."""

    streamed: int  # layers whose experts are on the host
    kv_on_host: bool
    disk_bytes: float  # of the streamed weights
    kv_tokens: int  # that fit
    max_num_seqs: int
    rows: int  # at once, of the mean row
    link_bandwidth: float
    link_seconds: float
    hbm_seconds: float
    compute_seconds: float
    prefill_seconds: float  # of a whole row
    step_seconds: float  # of a decode step
    row_seconds: float  # prefill and decode of one row, beside the others
    measured: bool  # whether prefill and decode steps are sums of measured kernels

    @property
    def bound(self) -> str:
        """What a decode step waits for."""
        seconds = {"link": self.link_seconds, "HBM": self.hbm_seconds, "compute": self.compute_seconds}
        return max(seconds, key=lambda name: seconds[name])

    @property
    def tokens_per_second(self) -> float:
        """Of decode alone."""
        return self.rows / self.step_seconds

    def streamed_text(self, model: Footprint) -> str:
        """What is not on the device, for a sentence on weights; nothing where all is."""
        if not self.streamed:
            return ""
        disk = f", {self.disk_bytes / 2**30:.2f} GiB of it from disk" if self.disk_bytes else ""
        size = self.streamed * model.layer_bytes / 2**30
        return f", experts of {self.streamed} of {model.layers} layers streamed ({size:.2f} GiB a step{disk})"


def cards(gpu: GPU, count: int, share: float, host_bytes: float, has_disk: bool = False) -> Machine:
    """`count` cards of which `share` of the memory is used, at the rates assumed of their data sheet."""
    return Machine(
        count * gpu.memory_gb * 1e9 * share, host_bytes, count * gpu.link_gbs * 1e9 * LINK_EFFICIENCY,
        count * gpu.bandwidth_gbs * 1e9 * EFFICIENCY, count * gpu.tflops * 1e12 * EFFICIENCY, has_disk,
        gpu if count == 1 else None,
    )  # fmt: skip


def select_placement(
    model: Footprint,
    machine: Machine,
    rows: Rows,
    *,
    longest: int,
    prefill_tokens: int,
    workspace: Callable[[int], float],
    max_num_seqs: int | None = None,
    stream: bool = True,
) -> Placement | None:
    """The best placement, None where none fits.

    `longest`: tokens of the longest row, of which the cache must hold one. `prefill_tokens`: of a prefill step.
    `workspace`: bytes of the largest step, by rows at once. `stream`: whether anything may lie on the host.
    """

    def place(streamed: int, kv_on_host: bool, limit: int) -> Placement | None:
        return _place(model, machine, rows, streamed, kv_on_host, limit, longest, prefill_tokens, workspace)

    whole = place(0, False, max_num_seqs or RESIDENT_ROWS)
    if whole is not None or not stream:
        return whole
    limits = (max_num_seqs,) if max_num_seqs else _STREAMED_ROWS
    counts = range(BUFFERS + 1, model.layers + 1)  # fewer than that save no memory
    options = (place(*option) for option in itertools.product(counts, (False, True), limits))
    return min(filter(None, options), key=lambda placement: placement.row_seconds, default=None)


def _place(
    model: Footprint, machine: Machine, rows: Rows, streamed: int, kv_on_host: bool, limit: int, longest: int,
    prefill_tokens: int, workspace: Callable[[int], float],
) -> Placement | None:  # fmt: skip
    on_host = streamed * model.layer_bytes
    disk = max(0.0, on_host - machine.host_bytes)
    if disk and not machine.has_disk:
        return None
    on_device = model.weight_bytes - on_host + min(BUFFERS, streamed) * model.layer_bytes
    room = machine.device_bytes - on_device - workspace(limit)
    tokens = room / model.kv_bytes
    if kv_on_host:
        tokens = min(room / staged_bytes(model), (machine.host_bytes - on_host) / model.kv_bytes)
    tokens = int(tokens)  # before rows are counted: what is left of a token holds none of theirs
    if tokens < longest:
        return None
    at_once = max(1.0, min(limit, rows.count, tokens // max(1.0, rows.context)))

    cached = at_once * rows.context * model.kv_bytes
    weights = (on_host - disk) / machine.link + disk * (1 / machine.link + 1 / DISK_BANDWIDTH)
    link = weights + kv_on_host * cached / machine.link
    roofline = RooflineCost(model, machine.hbm, machine.flops)
    decode = Step(decode_rows=at_once, context_tokens=at_once * rows.context, logits_rows=at_once)
    written = on_host / machine.hbm  # what comes over the link is written before it is read
    hbm = roofline.hbm_seconds(decode) + written + kv_on_host * cached / machine.hbm
    compute = roofline.compute_seconds(decode)
    decode_seconds = max(link, hbm, compute)
    prompt = max(1.0, rows.prompt)
    prefill = Step(
        prefill_tokens=prefill_tokens, prefill_pairs=prefill_tokens * prompt / 2, logits_rows=prefill_tokens / prompt
    )
    prefill_seconds = max(weights, roofline.hbm_seconds(prefill) + written, roofline.compute_seconds(prefill))
    measured = measured_cost(model, machine.card) if machine.card is not None and not streamed else None
    if measured is not None:
        decode_seconds, prefill_seconds = measured.seconds(decode), measured.seconds(prefill)
    prefill_seconds *= prompt / prefill_tokens  # of a row, which shares its steps with others
    return Placement(
        streamed, kv_on_host, disk, tokens, limit, int(at_once), machine.link, link, hbm, compute, prefill_seconds,
        decode_seconds, prefill_seconds + rows.answer * decode_seconds / at_once, measured is not None,
    )  # fmt: skip


def staged_bytes(model: Footprint) -> float:
    """Of the device, for a token whose keys and values are on the host."""
    return BUFFERS * model.kv_bytes / model.layers
