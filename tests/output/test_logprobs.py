"""Log-probabilities in the output: each token with its text, bytes and rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from batchmix.checkpoints.checkpoint import TINY
from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.input.config import DataConfig
from batchmix.output.config import OutputConfig, OutputFormat
from batchmix.output.logprobs import LOGPROBS, LOGPROBS_OF_IDS, TokenTexts
from batchmix.pipeline import generate
from batchmix.prompts.tokenizer import Tokenizer, load_tokenizer
from batchmix.records import TokenLogprob
from batchmix.sampling import SamplingConfig

ROWS = 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(TINY)
    assert found is not None
    return found


def run(folder: Path, rows: list[Any], form: OutputFormat = OutputFormat.arrow) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(Config(
        data=DataConfig(path=str(folder / "rows.jsonl")),
        sampling=SamplingConfig(max_tokens=12, temperature=3.0, top_k=500, seed=2, logprobs=3),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=str(folder / "out"), format=form, rows_per_shard=2),
    ))  # fmt: skip


def test_text_and_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.token_bytes(False)
    parts = [pieces.index(bytes([byte])) for byte in "😀".encode()]
    entries = [TokenLogprob(token, -0.5, [(pieces.index(b" the"), -0.25)], rank=2) for token in parts]
    found = TokenTexts(tokenizer).records(entries)
    assert found is not None
    assert [entry["token"] for entry in found] == ["\ufffd"] * 4
    assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == "😀"
    assert found[0]["top"] == [
        {"token": " the", "bytes": list(b" the"), "token_id": pieces.index(b" the"), "logprob": -0.25}
    ]
    assert [entry["rank"] for entry in found] == [2] * 4
    assert TokenTexts(tokenizer).records(None) is None


def test_without_a_tokenizer_there_are_ids_alone() -> None:
    entries = [TokenLogprob(5, -0.5, rank=1)]
    assert TokenTexts(None).records(entries) == [
        {"token": None, "bytes": None, "token_id": 5, "logprob": -0.5, "rank": 1, "top": []}
    ]
    assert TokenTexts(None).openai(entries) == [
        {"token": "token_id:5", "logprob": -0.5, "bytes": None, "top_logprobs": []}
    ]


@pytest.mark.parametrize("form", list(OutputFormat))
def test_the_column_of_a_run(tmp_path: Path, form: OutputFormat) -> None:
    run(tmp_path, [{"prompt": f"Ticket {i}: où? 😀"} for i in range(ROWS)], form)
    files = sorted(map(str, (tmp_path / "out").glob("part-*")))
    if form is OutputFormat.jsonl:
        rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    else:
        table = ds.dataset(files, format=form.value).to_table()
        assert table.schema.field("logprobs").type.equals(LOGPROBS.type)
        rows = table.to_pylist()
    ranks = []
    for row in rows:
        tokens = row["logprobs"]
        assert len(tokens) == row["completion_tokens"]
        text = bytes(byte for token in tokens for byte in token["bytes"]).decode(errors="replace")
        assert text.removesuffix("</s>").lstrip() == row["generated_text"].lstrip()
        for token in tokens:
            assert token["token"] == bytes(token["bytes"]).decode(errors="replace")
            likelier = sum(other["logprob"] > token["logprob"] for other in token["top"])
            assert token["rank"] == likelier + 1 if likelier < 3 else token["rank"] > 3
            ranks.append(token["rank"])
    assert len(rows) == ROWS
    assert min(ranks) == 1 < 3 < max(ranks)


def test_openai_responses_have_them_as_openai_does(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "logprobs": True,
            "top_logprobs": 2}  # fmt: skip
    run(
        tmp_path,
        [{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}],
        OutputFormat.jsonl,
    )
    (part,) = (tmp_path / "out").glob("part-*")
    (choice,) = json.loads(part.read_text())["response"]["body"]["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert [other.keys() for other in entry["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
        assert all(
            bytes(one["bytes"]).decode(errors="replace") == one["token"] for one in [entry, *entry["top_logprobs"]]
        )
    assert "".join(entry["token"] for entry in content).strip() == choice["message"]["content"].strip()


def test_a_run_of_an_earlier_release_keeps_the_column_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"Ticket {i}"} for i in range(ROWS)]
    with monkeypatch.context() as patch:
        patch.setattr("batchmix.preflight.columns_of", lambda storage: 1)
        run(tmp_path, rows)
    whole = ds.dataset(tmp_path / "out", format="arrow").to_table()
    assert whole.schema.field("logprobs").type.equals(LOGPROBS_OF_IDS.type)
    for path in [sorted((tmp_path / "out").glob("part-*"))[-1], tmp_path / "out/.batchmix/SUCCESS"]:
        path.unlink()
    run(tmp_path, rows)
    assert ds.dataset(tmp_path / "out", format="arrow").to_table().sort_by("row").equals(whole.sort_by("row"))
