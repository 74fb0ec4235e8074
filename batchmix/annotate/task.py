"""A labelling task as its file states it, made into the settings of an ordinary run.

The prompt is the instruction, what form the answer has, the examples, and the row's own text last, so that rows share all
but their own text and the engine computes the shared part once. It becomes `data.template`; that makes it part of the
run's identity, so a run that resumes with another instruction or other examples is refused.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from pathlib import Path
from typing import Any

import yaml

from batchmix.annotate.answer import Answer, Choice, Invalid, Json, Pattern, Text
from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.misread import misread_enum, undeclared
from batchmix.config import Config
from batchmix.config_checks import check
from batchmix.config_files import load_yaml
from batchmix.errors import BatchmixError
from batchmix.sampling import MAX_SCORED_CHOICES, SamplingConfig, StructuredOutputs
from batchmix.templates.messages import PromptError
from batchmix.templates.template import RowTemplate

_log = logging.getLogger(__name__)
_SCHEMAS = ("choice", "regex", "json_schema", "pydantic")


def prepare(config: Config) -> Config:
    """The run that the task asks for: files and classes read in, and the prompt composed.

    BatchmixError where the task contradicts itself, names what is not there, or has an example that is no answer.
    """
    task = config.annotate
    if task.input is None:
        raise BatchmixError(
            "annotate.input is not set: name a task, as in batchmix annotate sentiment data.path=..., or give a task file"
            " of your own (docs/annotate.md)"
        )
    if config.data.template is not None:
        raise BatchmixError(
            "data.template: a task makes the prompt from annotate.instruction and annotate.input; leave it out"
        )
    task = dataclasses.replace(task, json_schema=_json_schema(task), pydantic=None, examples=_examples(task.examples))
    answer = answer_of(task)
    if answer is None:
        raise AssertionError("annotate.input is set")
    for line in undeclared(task.json_schema):
        _log.warning(line)
    data = dataclasses.replace(config.data, template=_template(task, answer))
    _check_swap(task, config)
    return check(dataclasses.replace(config, annotate=task, data=data, sampling=_guided(config.sampling, task)))


def answer_of(task: AnnotateConfig) -> Answer | None:
    """What a prepared task takes for an answer; None where there is no task, as in `batchmix generate`."""
    if task.input is None:
        return None
    if task.choice is not None:
        return Choice(task.field, task.choice)
    if task.regex is not None:
        return Pattern(task.field, task.regex)
    if task.json_schema is not None:
        return Json(task.field, task.json_schema)
    return Text(task.field)


def _guided(sampling: SamplingConfig, task: AnnotateConfig) -> SamplingConfig:
    """Sampling that gives nothing but answers of the task."""
    if sampling.structured_outputs is not None:
        raise BatchmixError("sampling.structured_outputs: a task makes it from annotate.choice, regex or json_schema; leave it"
                            " out")  # fmt: skip
    if task.choice is None and task.regex is None and task.json_schema is None:
        return sampling
    # Few choices are all scored, exactly and without decoding; logprobs ask for the tokens to be decoded.
    scored = task.choice is not None and len(task.choice) <= MAX_SCORED_CHOICES and sampling.logprobs is None
    outputs = StructuredOutputs(
        choice=task.choice,
        regex=task.regex,
        json=task.json_schema,
        score_choices=scored,
        token_probabilities=not scored and sampling.logprobs is None,
    )
    return dataclasses.replace(sampling, structured_outputs=outputs)


def _json_schema(task: AnnotateConfig) -> Any:
    given = [key for key in _SCHEMAS if getattr(task, key) is not None]
    if len(given) > 1:
        raise BatchmixError(
            f"annotate.{given[0]} and annotate.{given[1]}: an answer has one form; leave one of them out"
        )
    if task.pydantic is not None:
        return _pydantic_schema(task.pydantic)
    schema = task.json_schema
    if isinstance(schema, str):
        path = schema
        schema = _read(path, "annotate.json_schema")
        if not path.endswith(".json") and (
            misread := misread_enum(Path(path).expanduser().read_text(encoding="utf-8"))
        ):
            raise BatchmixError(f"annotate.json_schema={path}: {misread}")
    if schema is not None and not isinstance(schema, dict):
        raise BatchmixError(f"annotate.json_schema={schema}: must be a mapping, or a file that holds one")
    return schema


def _pydantic_schema(name: str) -> dict[str, Any]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise BatchmixError(f"annotate.pydantic={name}: must be written package.module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BatchmixError(
            f"annotate.pydantic={name}: cannot be imported ({error}); PYTHONPATH says where to look"
        ) from None
    schema = getattr(found, "model_json_schema", None)
    if schema is None:
        raise BatchmixError(f"annotate.pydantic={name}: is no pydantic model")
    result: dict[str, Any] = schema()
    return result


def _read(path: str, key: str) -> Any:
    """What a .json, .jsonl or .yaml file holds."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        if path.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text) if path.endswith(".json") else load_yaml(text)
    except RecursionError:
        raise BatchmixError(f"{key}={path}: cannot be read (it is nested too deeply)") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BatchmixError(f"{key}={path}: cannot be read ({reason})") from None


def _examples(examples: Any) -> list[dict[str, Any]]:
    if isinstance(examples, str):
        examples = _read(examples, "annotate.examples")
    if not isinstance(examples or [], list):
        raise BatchmixError("annotate.examples must be a list of {input: text, answer: value}, or a file of it")
    for number, example in enumerate(examples or []):
        if not isinstance(example, dict) or "answer" not in example:
            raise BatchmixError(f"annotate.examples[{number}] has no answer: it must be {{input: text, answer: value}}")
    return examples or []


def _template(task: AnnotateConfig, answer: Answer) -> str:
    """Jinja for the whole prompt. Examples are rendered here and quoted."""
    assert task.input is not None
    own = task.input.strip()
    parts = [(task.instruction or "").strip()]
    if parts[0]:
        parts.append(_literal(answer.describe()))
    if parts[0]:
        RowTemplate(parts[0], "annotate.instruction")  # says which of the two cannot be parsed
    template = RowTemplate(own, "annotate.input")
    if task.examples:
        for number, example in enumerate(task.examples):
            parts.append(_literal(_example(template, example, answer, f"annotate.examples[{number}]")))
        parts.append(f"Input: {own}\nAnswer:")
    else:
        parts.append(own)
    return "\n\n".join(part for part in parts if part)


def _example(template: RowTemplate, example: dict[str, Any], answer: Answer, where: str) -> str:
    given = example["answer"]
    columns = {name: value for name, value in example.items() if name != "answer"}
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    try:
        answer.parse(text)
        as_it_is = set(columns) == {"input"} and "input" not in template.variables
        shown = str(columns["input"]) if as_it_is else template.render(columns)
    except (Invalid, PromptError) as error:
        raise BatchmixError(f"{where}: {error}") from None
    return f"Input: {shown}\nAnswer: {text}"


def _literal(text: str) -> str:
    """Jinja that prints the text, whatever is in it: a string literal, whose escapes are Python's."""
    return "{{ " + ascii(text) + " }}" if text else ""


def _check_swap(task: AnnotateConfig, config: Config) -> None:
    labels = task.swap_labels
    if (labels is None) != (config.data.swap_columns is None):
        raise BatchmixError("annotate.swap_labels and data.swap_columns: give both, or leave both out")
    if labels is not None and (len(labels) != 2 or not set(labels) <= set(task.choice or ())):
        raise BatchmixError(f"annotate.swap_labels={labels}: must be two of annotate.choice={task.choice}")
