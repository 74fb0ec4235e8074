"""The configuration as it may be written: URLs without their secrets, and texts from environment variables as the
interpolation that the user gave, `${oc.env:X}`. What is hidden is known by its fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.redact import FromEnvironment, fingerprint, redact, redact_url, remember

_DEEPEST = 10  # keys that refer to keys that refer to keys
# What is for the model or about its answers, and may hold URLs of any kind: kept as it is.
_CONTENTS = ("annotate.", "sampling.", "data.template", "data.system_prompt")
_log = logging.getLogger(__name__)


def remember_environment(composed: DictConfig) -> None:
    """Before anything can go wrong with them: the values of the variables that a configuration names are secrets."""

    def walk(written: Any) -> None:
        if isinstance(written, dict | list):
            for item in written.values() if isinstance(written, dict) else written:
                walk(item)
        elif isinstance(written, str):
            for name in re.findall(r"\boc\.env:\s*([^,}\s]+)", written):
                remember(os.environ.get(name, ""), f"${{oc.env:{name}}}")

    walk(OmegaConf.to_container(composed, resolve=False))


def hide_environment(composed: DictConfig, values: Any) -> dict[str, str]:
    """By path (`data.path`, `data.path[1]`), how each text is written that comes from environment variables, whether by
    itself or through other keys. Their values are remembered as secrets."""
    found: dict[str, str] = {}

    raw: Any = OmegaConf.to_container(composed, resolve=False)

    def reads_environment(written: Any, depth: int = 0) -> bool:
        if isinstance(written, dict | list):
            return any(
                reads_environment(item, depth) for item in (written.values() if isinstance(written, dict) else written)
            )
        if not isinstance(written, str) or depth > _DEEPEST:
            return False
        if "oc.env" in written or "${." in written:
            return True
        names = re.findall(r"\$\{([A-Za-z_][\w.\[\]]*)\}", written)
        return any(reads_environment(_find(raw, name), depth + 1) for name in names)

    def walk(value: Any, written: Any, path: str) -> None:
        whole = isinstance(written, str)  # `${other}`, which may stand for a list
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, written if whole else written[key], f"{path}.{key}" if path else str(key))
        elif isinstance(value, list):
            for place, item in enumerate(value):
                walk(item, written if whole else written[place], f"{path}[{place}]")
        elif whole and value != written and reads_environment(written):
            remember(str(value), written)
            found[path] = written

    walk(values, raw, "")
    return found


def _find(raw: Any, name: str) -> Any:
    """What stands at `data.path[0]`, its interpolations as they are; that of a group that is one for all its keys."""
    for step in re.findall(r"[^.\[\]]+", name):
        if isinstance(raw, str):
            break
        try:
            raw = raw[int(step)] if isinstance(raw, list) else raw[step]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return raw


def mark(config: Config, hidden: Mapping[str, str]) -> None:
    """Make the texts from the environment say so, but those by which a finished run is read back."""

    def marked(value: Any, path: str) -> Any:
        if dataclasses.is_dataclass(value):
            for name in (field.name for field in dataclasses.fields(value)):
                setattr(value, name, marked(getattr(value, name), f"{path}.{name}" if path else name))
        elif isinstance(value, list):
            return [marked(item, f"{path}[{place}]") for place, item in enumerate(value)]
        elif isinstance(value, dict):
            return {key: marked(item, f"{path}.{key}") for key, item in value.items()}
        elif path == "output.dir":
            value = os.path.expanduser(value)  # no shell does it inside a word
        if not isinstance(value, str) or path not in hidden:
            return value
        if path.startswith("annotate."):
            _log.warning(
                "%s is %s: a task belongs to its answers, so its value is written with them", path, hidden[path]
            )
            return value
        return value if path == "output.compression" else FromEnvironment(value, hidden[path])

    marked(config, "")


def to_plain(value: Any, text: Callable[[str, str], Any] | None = None, key: str = "") -> Any:
    """A configuration as JSON types, its texts as `text(key, value)` has them: as they may be written."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(name): to_plain(item, text, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, text, f"{key}[{place}]") for place, item in enumerate(value)]
    return (text or written_text)(key, value) if isinstance(value, str) else value


def hidden_texts(config: Config) -> dict[str, str]:
    """The texts that `to_plain` shows in part or not at all, by key: `data.path`, `data.path[1]`."""
    found: dict[str, str] = {}

    def note(key: str, value: str) -> None:
        if written_text(key, value) != value:
            found[key] = str(value)

    to_plain(config, note)
    return found


def written_override(override: str, plain: Mapping[str, Any], hidden: Mapping[str, str]) -> str:
    """An override of the command line as it may be written; `plain` and `hidden` are those of the configuration."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    group, _, rest = name.partition(".")
    if name.startswith(_CONTENTS) or not equals:
        return override
    if "${" not in value and any(path == name or path.startswith((f"{name}[", f"{name}.")) for path in hidden):
        return f"{key}={json.dumps(plain[group][rest] if rest else plain[group], ensure_ascii=False)}"
    return f"{key}={redact(value)}"


def quoted(key: str, value: str) -> str:
    """An override of a text, quoted for Hydra and around that for the shell: `"data.template='It\\'s {{ x }}'"`."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]  # quoted, but with such a quote within
    # Hydra takes a backslash for one that escapes only before a quote and at the end.
    text = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    override = f"{key}='{text}'"
    return shlex.quote(override) if re.search(r'["$`!]|\\\\', override) else f'"{override}"'


def value_of(run: Mapping[str, Any], group: str, name: str) -> Any:
    """What a key was, of which `run.json` may have but the interpolation; BatchmixError where its variables changed."""
    key, written = f"{group}.{name}", run["config"][group].get(name)
    expected = run.get("fingerprints", {}).get(key)
    if expected is None:
        return written
    try:
        value = OmegaConf.to_container(OmegaConf.create({"value": written}), resolve=True)["value"]  # type: ignore[call-overload, index]
    except OmegaConfBaseException:
        value = None
    if value is None or fingerprint(str(value)) != expected:
        raise BatchmixError(f"{key}={written}: was another value when the run was made; set the variables that it names as"
                            " they were then")  # fmt: skip
    return value


def written_text(key: str, value: str) -> str:
    """A key's text as it may be shown."""
    if isinstance(value, FromEnvironment):
        return redact_url(value.written)
    return value if key.startswith(_CONTENTS) else redact_url(value)


def identifying(key: str, value: str) -> Any:
    return {"scrypt": fingerprint(value)} if isinstance(value, FromEnvironment) else value


def same(before: Any, now: Any, named: bool = True) -> bool:
    """Whether two settings are one, of which either may be known by its fingerprint alone. Files of data are what they
    hold: their names count where they are `named`."""
    for one, other in ((before, now), (now, before)):
        if isinstance(one, dict) and "scrypt" in one and isinstance(other, str):
            return bool(one["scrypt"] == fingerprint(other))
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(same(*pair, named) for pair in zip(before, now, strict=True))
    if isinstance(before, dict) and isinstance(now, dict) and not named and "hub" not in before:
        keys = (before.keys() | now.keys()) - {"name"}
        return all(same(before.get(key), now.get(key), named) for key in keys)
    return bool(before == now)
