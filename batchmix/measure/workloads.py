"""The work of `batchmix benchmark throughput`: a random model's folder, and seeded rows in a JSONL file."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

from batchmix.measure.case import SHAPES
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.prompts.tokenizer import Tokenizer
from batchmix.templates.messages import Message, PromptError

WORKLOADS = ("annotate", "synthesise", "long")
ROWS = {"annotate": 4000, "synthesise": 4000, "long": 400, "offload": 400}
INSTRUCTION = 700  # tokens that every annotate row begins with
_SIGMA = 0.7  # of the logarithm of lengths
_POSITIONS = 32768
_TINY_SHARE = 8  # a tiny model, which is there to try the code path, has lengths so much shorter


@dataclass(frozen=True)
class Work:
    """Rows as the model sees them: token ids, and how many tokens each is answered with."""

    name: str
    prompts: list[list[int]]
    answers: list[int]
    shared: int  # leading tokens that all prompts have in common

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.answers)


def save_model(folder: Path, shape: str, layers: int, dtype: str) -> None:
    """Write the config.json of a Mixtral of random weights (model.format=random)."""
    sizes = SHAPES[shape]
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": max(sizes.vocab, 32000),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "max_position_embeddings": _POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    if importlib.util.find_spec("sentencepiece") and importlib.util.find_spec("mistral_common"):
        config["batchmix_tokenizer"] = "mistral-v1"
    (folder / "config.json").write_text(json.dumps(config))


def full_layers(shape: str) -> int:
    """Of the model whose sizes they are."""
    return {"8x7b": 32, "8x22b": 56, "tiny": 2}[shape]


def draw_work(name: str, rows: int | None, shape: str, model: MixtralConfig, tokenizer: Tokenizer | None,
              folder: Path, title: str | None = None) -> Work:  # fmt: skip
    """Write the rows of workload `name` to `<title or name>.jsonl` and return them as token ids. Seeded by `name`.

    With a tokenizer a row is a text of words that are one token each, so the pipeline has all of its work to do and
    lengths are still what they should be (plus the 8 tokens of the chat format); without one a row is token ids.
    """
    source = random.Random(name)
    count = rows if rows is None or name != "long" else max(1, rows // 10)
    sizes = [draw_sizes(name, source) for _ in range(ROWS[name] if count is None else count)]
    share = _TINY_SHARE if shape == "tiny" else 1
    sizes = [(max(1, words // share), max(2, answer // share)) for words, answer in sizes]
    instruction = INSTRUCTION // share if name == "annotate" else 0
    words = None if tokenizer is None else _words(tokenizer)
    choices = range(3, model.vocab_size) if words is None else range(len(words))
    common = source.choices(choices, k=instruction)
    drawn = [common + source.choices(choices, k=own) for own, _ in sizes]
    texts = None if words is None else [" ".join(words[word] for word in row) for row in drawn]
    title = title or name
    with (folder / f"{title}.jsonl").open("w") as file:
        for row, (ids, (_, answer)) in enumerate(zip(drawn, sizes, strict=True)):
            content = {"prompt_token_ids": ids} if texts is None else {"prompt": texts[row]}
            sampling = {"max_tokens": answer, "ignore_eos": True, "temperature": 0}
            file.write(json.dumps({"id": f"{title}-{row}", **content, "sampling": sampling}) + "\n")
    prompts = drawn if texts is None or tokenizer is None else _encode(texts, tokenizer)
    return Work(title, prompts, [answer for _, answer in sizes], _common_start(prompts) if instruction else 0)


def draw_sizes(name: str, source: random.Random) -> tuple[int, int]:
    """(own prompt tokens, answer tokens) of one row."""
    if name == "annotate":
        return _lognormal(source, 400, 8192), 48
    if name == "synthesise":
        return _lognormal(source, 200, 4096), _lognormal(source, 350, 1024)
    if name == "extraction":  # of benchmarks/bench_schedule.py
        return _lognormal(source, 992, 8192), _lognormal(source, 300, 1024)
    if name == "offload":  # of `benchmark offload`: whole passes over the link, and not too many of them
        return 512, 32
    return source.randint(4096, 16384 - 300), 256


def _lognormal(source: random.Random, mean: float, most: int) -> int:
    return min(most, max(1, round(source.lognormvariate(math.log(mean) - _SIGMA**2 / 2, _SIGMA))))


def _words(tokenizer: Tokenizer) -> list[str]:
    """Words that are one token after a space, and so one token each whatever other rows there are."""
    pieces = tokenizer.token_bytes()
    return [piece[1:].decode() for piece in pieces if re.fullmatch(rb" [a-z]{3,9}", piece)]


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    encoded = tokenizer.encode_chats([[Message("user", (text,))] for text in texts])
    return [list(ids) for ids in encoded if not isinstance(ids, PromptError)]


def _common_start(prompts: list[list[int]]) -> int:
    first, shortest = prompts[0], min(map(len, prompts))
    return next(
        (place for place in range(shortest) if any(prompt[place] != first[place] for prompt in prompts)), shortest
    )
