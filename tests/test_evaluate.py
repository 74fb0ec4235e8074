"""`batchmix evaluate`: exact matches, their interval, and quantised models on the example tickets."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchmix.annotate.config import EvaluateConfig
from batchmix.annotate.metrics import wilson
from batchmix.checkpoints.config import ModelConfig
from batchmix.config import Config
from batchmix.dtypes import KVCacheDtype, Quantization
from batchmix.errors import BatchmixError
from batchmix.evaluate import Accuracy, evaluate, score
from batchmix.input.config import DataConfig
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputConfig, OutputFormat
from batchmix.output.part_formats import part_format
from batchmix.output.parts import Parts
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder

TICKETS = Path(__file__).parents[1] / "examples" / "support_tickets.jsonl"


def write(folder: Path, form: OutputFormat, name: str, texts: list[str | None], gold: list[str | None]) -> None:
    table = pa.table({"generated_text": pa.array(texts, pa.string()), "label": pa.array(gold, pa.string())})
    path = folder / f"{name}.{form.value}"
    if form is OutputFormat.arrow:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif form is OutputFormat.parquet:
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


@pytest.mark.parametrize("form", list(OutputFormat))
def test_score_counts_exact_answers(tmp_path, form):
    write(tmp_path, form, "part-00000-000000", ["a", " b\n", "c", None], ["a", "b ", "C", "d"])
    write(tmp_path, form, "part-00000-000001", ["e", "f"], [None, "f"])
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    found = score(Parts(LocalFolder(tmp_path), part_format(form, columns, None, None)), "label")
    assert (found.right, found.answers, found.without_gold) == (3, 5, 1)
    assert found.text() == (
        "accuracy: 3 of 5 answers exactly right (60.0%, 95% interval 23.1% to 88.2%);"
        " 1 without a gold answer are left out"
    )


def test_the_interval_is_wilsons():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def job(tmp_path: Path, rows: int, **model: object) -> Config:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(TICKETS.read_text().splitlines(keepends=True)[:rows]))
    return Config(
        model=ModelConfig(**model),
        data=DataConfig(path=str(data)),
        sampling=SamplingConfig(temperature=0.0, max_tokens=64),
        output=OutputConfig(dir=str(tmp_path / "out")),
        evaluate=EvaluateConfig(gold_column="gold"),
    )  # fmt: skip


def test_a_run_and_then_its_folder_alone(tmp_path, capsys):
    config = job(tmp_path, 8)
    first = evaluate(config)
    assert first.text() in capsys.readouterr().out
    assert first.answers == 8
    assert json.loads((tmp_path / "out" / ".batchmix/evaluation.json").read_text())["right"] == first.right >= 6
    config.data.path = ""
    assert evaluate(config) == first
    capsys.readouterr()
    demo = runpy.run_path(str(TICKETS.with_name("demo.py")))["main"]
    assert demo(config.output.dir) == int(first.right < 0.95 * 8)
    assert first.text() in capsys.readouterr().out
    config.evaluate.gold_column = "label"
    with pytest.raises(BatchmixError, match=r"evaluate\.gold_column=label: .* has no column label, only row, id"):
        evaluate(config)
    config.output.dir = str(tmp_path / "none")
    with pytest.raises(BatchmixError, match=r"holds no \.batchmix/run\.json, so no run of batchmix has begun there"):
        evaluate(config)


def test_another_quantisation_is_another_run(tmp_path):
    config = job(tmp_path, 3, quantization=Quantization.int8)
    evaluate(config)
    for change, match in (({"quantization": None}, 'model.quantization was "int8", is now null'),
                          ({"quantization": Quantization.int8, "kv_cache_dtype": KVCacheDtype.fp8},
                           'model.kv_cache_dtype was "auto", is now "fp8"')):  # fmt: skip
        with pytest.raises(BatchmixError, match=match):
            evaluate(job(tmp_path, 3, **change))
    metadata = ds.dataset(str(tmp_path / "out"), format="arrow").schema.metadata
    assert metadata[b"batchmix.quantization"] == b"int8"


QUANTISED = {
    "fp8": {"quantization": Quantization.fp8},
    "int8": {"quantization": Quantization.int8},
    "int4": {"quantization": Quantization.int4},
    "fp8 cache": {"kv_cache_dtype": KVCacheDtype.fp8},
    "int4 and fp8 cache": {"quantization": Quantization.int4, "kv_cache_dtype": KVCacheDtype.fp8},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Accuracy:
    """Of the built-in model in bfloat16."""
    return evaluate(job(tmp_path_factory.mktemp("plain"), 1000))


@pytest.mark.slow  # 1,000 rows each
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_model_is_within_a_point_of_bfloat16(tmp_path, plain, name):
    found = evaluate(job(tmp_path, 1000, **QUANTISED[name]))
    assert found.right >= plain.right - 10, (found.text(), plain.text())
