"""Turns what Hydra, OmegaConf and PyYAML say about a wrong configuration into one line with the remedy.

Their exceptions know the full key and the offending value; the names and types that would have been right come
from the dataclasses that `config.py` lists.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    KeyValidationError,
    OmegaConfBaseException,
    ValidationError,
)

from batchmix.config import JOBS, Config
from batchmix.install_hint import install_hint
from batchmix.other_names import ABSENT, RENAMED, explain_other_name
from batchmix.written_config import quoted

_EXAMPLES = {"data.path": "prompts.jsonl", "output.dir": "out"}
_NEAR = 1.2  # of 2: likeness of the whole key plus likeness of its last name


def explain(error: Exception, job: str) -> str:
    """What is wrong with the configuration of a job and how to mend it, in one line."""
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error.override)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_choice(error.missing_cfg_file or "", error.options)
    if isinstance(error, MissingConfigException) and "hydra/launcher" in str(error.missing_cfg_file):
        return f"hydra/launcher=slurm: needs submitit; {install_hint('cluster')}"
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'", str(error)):
        key, _, value = ambiguous[1].partition("=")
        return f"{key}={value}: quote it if it is one text, {quoted(key, value)}, write {key}=[{value}] if it is a list"
    choice = re.match(r"Could not override '(\w+)'", str(error))  # of a group that is not in the defaults list
    if choice and choice[1] in known_keys() and choice[1] not in JOBS[job]:
        return unread(choice[1], job)
    cause = next((link for link in _chain(error) if isinstance(link, OmegaConfBaseException) and link.full_key), None)
    message = _explain_key(cause, job) if cause else _explain_shape(error) or _one_line(_without_footer(str(error)))
    source = re.match(r"In '([^']*)': ", str(error))
    return f"{message} (in {source[1]}.yaml)" if source and not message.startswith("In '") else message


def explain_missing(keys: Iterable[str]) -> str:
    """Which keys have to be given, with an example of each."""
    keys = sorted(keys)
    example = " ".join(f"{key}={_EXAMPLES.get(key, '...')}" for key in keys)
    return f"{' and '.join(keys)} must be given, for example {example}"


def explain_flags(flags: Iterable[str], job: str) -> str:
    """Of options that are none of Hydra's, such as --model: keys are given as key=value."""
    return "; ".join(_explain_flag(flag, job) for flag in flags)


def _explain_flag(flag: str, job: str) -> str:
    name = flag.partition("=")[0].lstrip("-").replace("-", "_")
    if name in ABSENT:
        return f"{flag}: {ABSENT[name]}"
    keys = [key for key in known_keys(job) if key.rpartition(".")[2] == name and "." in key]
    place = {"model": "model.path", "data": "data.path", "output": "output.dir"}.get(name) or RENAMED.get(name)
    if place is None and keys:
        place = keys[0]
    if place is None:
        return f"{flag}: no such option; keys are given as key=value, for example data.path=prompts.jsonl"
    return f"{flag}: keys are given as key=value; write {place}{'' if '=' in place or ' ' in place else '=...'}"


def unread(key: str, job: str) -> str:
    """Of a key or a group of other jobs."""
    if key == "experiment":
        return (
            "experiment: its file must begin with the line `# @package _global_`, so that its keys are those of the job"
        )
    return f"{key}: batchmix {job} does not read it; its keys begin with {', '.join(JOBS[job])}"


def known_keys(job: str | None = None) -> dict[str, Any]:
    """Every key (of a job), groups included, with its type: `data` DataConfig, `data.path` Any ..."""
    return {key: hint for key, hint, _ in _flatten(Config, "") if job is None or key.partition(".")[0] in JOBS[job]}


def descriptions() -> dict[str, str | None]:
    """Of every key in one line; None of a group at the top."""
    return {key: text for key, _, text in _flatten(Config, "")}


def job_help(text: str, job: str) -> str:
    """Hydra's help of a job: with the choices that it reads alone, and each key's description as a comment."""
    choices, heading, keys = text.partition("\nKeys, given as")
    begin, title, choices = choices.partition("Choices, given as group=choice:\n\n")
    groups = [line for line in choices.splitlines(keepends=True) if _reads(job, line.partition(":")[0])]
    return begin + (title + "".join(groups) if groups else "") + heading + _described(keys)


def _reads(job: str, choice: str) -> bool:
    return choice in JOBS[job] or (choice == "experiment" and "data" in JOBS[job])


def _described(text: str) -> str:
    lines, path, texts = [], [""], descriptions()
    for line in text.splitlines(keepends=True):
        if found := re.match(r"( *)(\w+):(?: |$)", line):
            path[len(found[1]) // 2 :] = [found[2]]
            if described := texts.get(".".join(path)):
                line = f"{line.rstrip()}  # {described}\n"
        lines.append(line)
    return "".join(lines)


def _flatten(cls: type, prefix: str) -> Iterable[tuple[str, Any, str | None]]:
    """Of each key below a group: the key, its type and its description."""
    texts = {field.name: field.metadata.get("help") for field in dataclasses.fields(cls)}
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name, hint, texts[name]
        for group in (hint, *typing.get_args(hint)):  # a group may be null
            if dataclasses.is_dataclass(group):
                yield from _flatten(typing.cast(type, group), f"{prefix}{name}.")


def _explain_key(error: OmegaConfBaseException, job: str) -> str:
    key = str(error.full_key)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return _explain_unknown(key, job)
    if isinstance(error, InterpolationToMissingValueError):
        return f"{key}: refers to a key that has no value"
    owner = _owner(key)
    if isinstance(error, ValidationError | KeyValidationError) and owner is not None:
        subject = "" if owner == key else f"{owner} "
        return f"{key}={_as_yaml(error.value)}: {subject}must be {_describe(known_keys()[owner])}"
    return f"{key}: {_one_line(str(error).partition('full_key:')[0])}"


def _explain_shape(error: Exception) -> str | None:
    """Of values of which OmegaConf does not say where they are: one in the place of a group, a list and a mapping confused."""
    if wrong := re.search(r"\w+ is not a subclass of (\w+)\. value: (.*)", str(error)):
        group = next((key for key, hint in known_keys().items() if getattr(hint, "__name__", "") == wrong[1]), wrong[1])
        return f"{group}={wrong[2]}: must be a group of keys, each with its value"
    if "Cannot merge DictConfig with ListConfig" in str(error):
        return "a mapping stands where a list belongs, which is written [a, b], or a list where a mapping does"
    return None


def _explain_unknown(key: str, job: str) -> str:
    group = key.partition(".")[0]
    if group in known_keys() and group not in JOBS[job]:
        return unread(key, job)
    name = key.rpartition(".")[2]
    if name in ABSENT or RENAMED.get(name, "").partition(".")[0] in JOBS[job]:
        return f"{key}: no such key; {explain_other_name(name)}"
    known = known_keys(job)
    best = max(known, key=lambda candidate: _likeness(key, candidate))
    if _likeness(key, best) >= _NEAR:
        return f"{key}: no such key, did you mean {best}?"
    if group == "hydra":
        return f"{key}: Hydra has no such key"
    if dataclasses.is_dataclass(known.get(group)):
        siblings = ", ".join(field.name for field in dataclasses.fields(known[group]))
        return f"{key}: no such key; {group} has {siblings}"
    return f"{key}: no such key; keys begin with {', '.join(JOBS[job])}"


def _explain_choice(missing: str, options: Iterable[str]) -> str:
    options = sorted(options)
    group, given = next(
        ((group, missing.removeprefix(f"{group}/")) for group in known_keys() if missing.startswith(f"{group}/")),
        (missing.rpartition("/")[0], missing.rpartition("/")[2]),
    )
    place = next((key for key in (f"{group}.path", f"{group}.dir") if key in known_keys()), None)
    if place and re.search(r"[/.]", given):
        return f"{group}={given}: no such choice; a file or folder is given as {place}={given}"
    close = difflib.get_close_matches(given, options, n=1)
    near = f", did you mean {close[0]}?" if close else ";"
    return f"{group}={given}: no such choice{near} the choices are {', '.join(options) or 'none'}"


def _explain_syntax(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: not of the form key=value, for example data.path=prompts.jsonl"
    return f"{override}: the value cannot be read; a text with special characters needs quotes, {quoted(key, value)}"


def _likeness(key: str, candidate: str) -> float:
    def ratio(left: str, right: str) -> float:
        return difflib.SequenceMatcher(None, left, right).ratio()

    return ratio(key, candidate) + ratio(key.rpartition(".")[2], candidate.rpartition(".")[2])


def _owner(key: str) -> str | None:
    """The configuration key that `key` lies in: `sampling.stop` for `sampling.stop[0]` or a bare `stop[0]`."""
    known = known_keys()
    while key:
        if owner := next((name for name in known if name == key or name.endswith(f".{key}")), None):
            return owner
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return None


def _describe(hint: Any, plural: bool = False) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join("null" if argument is type(None) else _describe(argument) for argument in arguments)
    if typing.get_origin(hint) is list:
        return f"a list of {_describe(arguments[0], plural=True)}, written [a,b]"
    if typing.get_origin(hint) is dict:
        return f"a mapping from {' to '.join(_describe(a, plural=True) for a in arguments)}, written {{3:1.5}}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(hint.__members__)}"
    if dataclasses.is_dataclass(hint):
        return "a group of keys"
    names: Mapping[Any, tuple[str, str]] = {
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "booleans"),
        str: ("text", "texts"),
    }
    return names[hint][plural]


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _as_yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _without_footer(message: str) -> str:
    return re.split(r"\n\s*(?:Config search path:|See https://)", message)[0]


def _one_line(message: str) -> str:
    return " ".join(message.split())
