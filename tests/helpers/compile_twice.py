"""Record launches for an H200, compile them, do so again, then launch: what was in the cache when.

Its own process, because the tests' interpreter compiles nothing: `python compile_twice.py` prints JSON. It compiles
in two processes, or with `here` in this one, which saves their starts.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    import triton
    from ahead_of_time import _Driver
    from triton.runtime.driver import driver

    from batchmix.kernels.compile import Specialization, _compile, compile_in_processes, recorded
    from batchmix.kernels.gpu import H200, assume_gpu
    from batchmix.kernels.moe import launch_experts
    from batchmix.kernels.tiles import Tile

    w = torch.empty(8, 256, 128, dtype=torch.bfloat16, device="meta")
    tile = Tile(16, 32, 64, 64, 4, 2, swap_ab=False, tma=True)

    def launch(rows: int, tile: Tile) -> None:
        x, out = (torch.empty(rows * 8 // top, 128, dtype=w.dtype, device="meta") for top in (2, 1))
        order, offsets = (torch.empty(size, dtype=torch.int32, device="meta") for size in (rows * 8, 9))
        launch_experts(x, None, w, None, order, offsets, None, out, 2, tile)

    def launch_all() -> None:
        for rows in (16, 4096):
            launch(rows, tile)
            launch(rows, replace(tile, programs_per_sm=2))
            launch(rows, replace(tile, num_warps=8, permute=True))

    found: dict[str, Any] = {}
    with recorded(H200) as jobs:
        launch_all()
    found["kernels"] = sorted((job.kernel, job.options["num_warps"]) for job in jobs)
    if sys.argv[1:] == ["here"]:
        found["outcomes"] = [[vars(_compile(job)) for job in jobs] for _ in range(2)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "takes_the_process_down.py").write_text("import os\nos._exit(3)\n")
            sys.path.append(folder)  # of the processes too
            names = ("takes_the_process_down:kernel", "batchmix.kernels.moe:gone")
            broken = [Specialization(**{**vars(jobs[0]), "kernel": name}) for name in names]
            first = compile_in_processes([*broken, *jobs, jobs[0]], processes=2)
        again, late = (compile_in_processes(jobs, processes=1, limit=limit) for limit in (None, 0.0))
        found["outcomes"] = [[vars(outcome) for outcome in outcomes] for outcomes in (first, again, late)]

    launched: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: launched.append(cache_hit)
    driver.set_active(_Driver("sm_90"))  # type: ignore[arg-type]
    with assume_gpu(H200):
        launch_all()
    found["launched"] = launched
    with recorded(H200) as same:  # of kernels that this process has compiled
        launch_all()
        refused: list[str] = []
        other = threading.Thread(target=lambda: refused.append(_refusal(lambda: launch(16, tile))))
        other.start()
        other.join()
    found["again"] = [job.identity for job in same] == [job.identity for job in jobs]
    found["refused"] = refused
    print(json.dumps(found))


def _refusal(call: Any) -> str:
    from batchmix.kernels.gpu import H200, assume_gpu

    try:
        with assume_gpu(H200):
            call()
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    main()
