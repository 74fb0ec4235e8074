"""YAML files that users give, checked before anything is made of them: a few hundred bytes of aliases can stand for
billions of values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from batchmix.errors import BatchmixError

_MOST_NODES = 1_000_000  # of a file, each alias counted as what it stands for


def load_yaml(text: str) -> Any:
    """What the text holds. ValueError where its aliases stand for too much or for themselves; yaml.YAMLError."""
    _check_size(text)
    return yaml.safe_load(text)


def check_config_files(folder: str) -> None:
    """BatchmixError for a YAML file at any depth of a folder of configurations whose aliases stand for too much."""
    for path in sorted(Path(folder).rglob("*.yaml")):
        try:
            _check_size(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            continue  # said by Hydra, if it is the one to be read
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise BatchmixError(f"{path}: cannot be read ({reason})") from None


def _check_size(text: str) -> None:
    sizes: dict[int, int] = {}  # by node; 0 while it is being counted

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if (known := sizes.get(id(node))) is not None:
            if known == 0:
                raise ValueError("an alias in it stands for what it is a part of")
            return known
        sizes[id(node)] = 0
        found = 1
        for child in node.value:
            found += sum(map(size, child)) if isinstance(child, tuple) else size(child)
        sizes[id(node)] = found
        return found

    if (nodes := size(yaml.compose(text, yaml.SafeLoader))) > _MOST_NODES:
        raise ValueError(f"its aliases stand for {nodes:,} values, more than {_MOST_NODES:,}")
