"""Label every row of a data set: typed columns, checks against people's labels, and a report."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from batchmix.config import Config
from batchmix.hydra_app import job


@job("annotate")
def _run(config: Config) -> None:
    from batchmix.annotate.run import annotate  # imports torch: only once the configuration is known to be right

    annotate(config)


def main(argv: Sequence[str] | None = None) -> int:
    """As any job, but a first argument without `=` is a task: one of conf/annotate/, or a YAML file anywhere."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else ""
    if not first or "=" in first or first.startswith("-"):
        return _run(arguments)
    if not first.endswith((".yaml", ".yml")):
        return _run([f"annotate={first}", *arguments[1:]])
    path = Path(first)
    if not path.is_file():
        print(f"batchmix: error: {first}: no such task file", file=sys.stderr)
        return 1
    # Hydra takes groups from folders: a copy, in the global package that the file's keys are written for.
    with tempfile.TemporaryDirectory(prefix="batchmix-") as folder:
        (Path(folder) / "annotate").mkdir()
        (Path(folder) / "annotate" / "task.yaml").write_bytes(b"# @package _global_\n" + path.read_bytes())
        return _run(["--config-dir", folder, "annotate=task", *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main())
