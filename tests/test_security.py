"""What docs/security.md says of files that may be anyone's: that they run no code, and which one does."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_mixtral, save_hub, save_mistral
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.task import prepare
from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.loading import load_weights
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.input.source import open_source
from batchmix.jobs.annotate import main as annotate
from batchmix.models.weights import Weights
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.templates.messages import PromptError
from batchmix.templates.template import RowTemplate

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}


def load(folder: Path) -> Weights:
    checkpoint = open_checkpoint(ModelConfig(path=str(folder)))
    return load_weights(checkpoint, torch.float32, torch.device("cpu"))


class Payload:
    """What a hostile pickle holds: a call that is made where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_file_runs_no_code(tmp_path: Path, zipped: bool) -> None:
    path = save_mistral(random_mixtral(**SMALL), tmp_path / "model", pth=True) / "consolidated.00.pth"
    state, trace = torch.load(path, weights_only=True), tmp_path / "trace"
    torch.save({**state, "extra": Payload(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BatchmixError, match=r"consolidated\.00\.pth"):
        load(path.parent)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload is none"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_other_pickles_beside_safetensors_are_not_read(tmp_path: Path, name: str) -> None:
    folder = save_hub(random_mixtral(**SMALL), tmp_path / "model")
    torch.save(Payload(tmp_path / "trace"), folder / name)
    load(folder)
    assert not (tmp_path / "trace").exists()


def test_a_checkpoint_folder_imports_none_of_its_python(tmp_path: Path) -> None:
    """`auto_map` is how the hub's folders name code of their own, which transformers runs where it is trusted."""
    folder = save_hub(random_mixtral(**SMALL), tmp_path / "model")
    trace = tmp_path / "trace"
    for name in ("modeling_own", "tokenization_own", "configuration_own"):
        (folder / f"{name}.py").write_text(f"import os; os.mkdir({str(trace)!r})\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<s>": 0, "</s>": 1, "a": 2}
    Tokenizer(WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}, "bos_token": "<s>",
           "eos_token": "</s>", "chat_template": "{{ messages[0]['content'] }}", "tokenizer_class": "Own"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    for read in (load, load_tokenizer):
        with suppress(BatchmixError):  # refusing the folder is as good
            read(folder)
    assert not trace.exists()


def test_a_folder_of_data_runs_no_script(tmp_path: Path) -> None:
    """Data sets of the hub once were Python; `datasets` runs none since its version 4, nor does batchmix."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'trace')!r})")
    with pytest.raises(BatchmixError, match="data"):
        open_source(DataConfig(path=str(folder)), Config().shard)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "source",
    [
        "{{ text.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('TRACE') }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{{ text.format.__globals__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(text) }}",
        "{{ lipsum.__globals__['os'].mkdir('TRACE') }}",
    ],
)
def test_a_template_reaches_nothing_but_the_row(tmp_path: Path, source: str) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(PromptError):
        RowTemplate(source.replace("TRACE", str(trace))).render({"text": "x"})
    assert not trace.exists()


def test_a_row_is_no_template(tmp_path: Path) -> None:
    assert RowTemplate("{{ text }}").render({"text": "{{ 1 + 1 }}"}) == "{{ 1 + 1 }}"


def test_yaml_makes_no_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, task = tmp_path / "trace", tmp_path / "task.yaml"
    task.write_text(f"annotate:\n  input: !!python/object/apply:os.mkdir ['{trace}']\n")
    assert annotate([str(task), "data.path=x", f"output.dir={tmp_path / 'out'}"]) == 1
    assert "cannot be read as a task file" in capsys.readouterr().err
    task.write_text("annotate:\n  input: '{{ text }}'\n  examples: examples.yaml\n")
    examples = tmp_path / "examples.yaml"
    examples.write_text(f"- !!python/object/apply:os.mkdir ['{trace}']\n")
    given = AnnotateConfig(input="{{ text }}", examples=str(examples))
    with pytest.raises(BatchmixError, match="cannot be read"):
        prepare(Config(annotate=given, data=DataConfig(path="x")))
    assert not trace.exists()


def test_a_task_file_imports_what_pydantic_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that runs code: a task is as trusted as the program that it is given to."""
    trace = tmp_path / "trace"
    (tmp_path / "module_of_a_task.py").write_text(
        f"import os, pydantic\nos.mkdir({str(trace)!r})\nclass Label(pydantic.BaseModel):\n    topic: str\n"
    )
    pytest.importorskip("pydantic")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = AnnotateConfig(input="{{ text }}", pydantic="module_of_a_task:Label")
    prepare(Config(annotate=given, data=DataConfig(path="x")))
    assert trace.exists()
    monkeypatch.delitem(sys.modules, "module_of_a_task")
