"""Label every row of a data set: typed columns, checks against people's labels, and a report."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from batchmix.annotate.misread import misread_labels
from batchmix.config import Config
from batchmix.config_files import load_yaml
from batchmix.hydra_app import job


@job("annotate")
def _run(config: Config) -> None:
    from batchmix.annotation import annotate  # imports torch: only once the configuration is known to be right

    annotate(config)


def main(argv: Sequence[str] | None = None) -> int:
    """As any job, but a first argument without `=` is a task: one of conf/annotate/, or a YAML file anywhere."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else ""
    if not first or "=" in first or first.startswith("-"):
        return _run(arguments)
    if not first.endswith((".yaml", ".yml")):
        return _run([f"annotate={first}", *arguments[1:]])
    return _run_file(Path(first), arguments[1:])


def _run_file(path: Path, arguments: Sequence[str]) -> int:
    """Hydra takes the files of a group from folders, so the task file is copied into one. Its keys need no package."""
    try:
        text = path.read_text(encoding="utf-8")
        load_yaml(text)  # which refuses what its aliases make too large
        misread = misread_labels(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        print(f"batchmix: error: {path}: cannot be read as a task file ({reason})", file=sys.stderr)
        return 1
    if misread:
        print(f"batchmix: error: {path}: {misread}", file=sys.stderr)
        return 1
    name = path.stem if path.stem.replace("-", "_").isidentifier() else "task"
    with tempfile.TemporaryDirectory(prefix="batchmix-") as folder:
        (Path(folder) / "annotate").mkdir()
        (Path(folder) / "annotate" / f"{name}.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
        return _run(["--config-dir", folder, f"annotate={name}", *arguments])


if __name__ == "__main__":
    sys.exit(main())
