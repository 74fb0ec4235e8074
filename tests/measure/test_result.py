"""The file that a benchmark's result goes to."""

from __future__ import annotations

import datetime
import json

from batchmix.measure.result import save_result


def test_a_result_is_named_after_the_day_the_device_and_what_was_measured(tmp_path):
    path = save_result(tmp_path / "new" / "results", "NVIDIA H100 80GB (HBM3)", "kernels", {"shape": "tiny"})
    date = datetime.date.today().isoformat()
    assert path == tmp_path / "new" / "results" / f"{date}-nvidia-h100-80gb-hbm3-kernels.json"
    assert json.loads(path.read_text()) == {"date": date, "shape": "tiny"}
