"""Model folders as tokenizers are found in them, made from what ships with mistral-common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mistral_common
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DATA = Path(mistral_common.__file__).parent / "data"
V1, V3 = DATA / "tokenizer.model.v1", DATA / "mistral_instruct_tokenizer_240323.model.v3"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_SYSTEM_LAST = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] + '\n\n' %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in turns %}{%- if message['role'] == 'user' %}"
    "{{- ' [INST] ' + (system if loop.last else '') + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
LLAMA_SYSTEM = MISTRAL_SYSTEM_LAST.replace("messages[0]['content'] + '\n\n'", "'<<SYS>>' + messages[0]['content']")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def convert(path: Path) -> Tokenizer:
    """The tokenizer.json of a SentencePiece model, as transformers converts Llama's."""
    model = SentencePieceProcessor(model_file=str(path))
    vocab = {model.id_to_piece(token): token for token in range(model.vocab_size())}
    merges = []
    for piece, token in vocab.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in splits if left in vocab and right in vocab]
        merges += [
            (-model.get_score(token), *pair)
            for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ]
    merges = [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [model.id_to_piece(token) for token in range(model.vocab_size()) if model.is_control(token)]
    tokenizer.add_special_tokens(["<unk>", *(AddedToken(piece, normalized=False) for piece in control)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


def convert_v1() -> Tokenizer:
    """A tokenizer.json of the v1 SentencePiece model, with ChatML's tokens added; one of them is not special."""
    tokenizer = convert(V1)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=False, normalized=False)])
    return tokenizer


def train_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<s>", "</s>"],
    )
    words = ["the quick brown fox jumps over the lazy dog", "system user assistant", "im_start im_end </s> <s>"]
    tokenizer.train_from_iterator(words * 3, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=False), AddedToken("fox", special=False)])
    return tokenizer


def save(folder: Path, backend: Tokenizer, template: Any, **keys: Any) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json, and no weights."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
    }
    config |= keys
    if template is not None:
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)
    return folder
