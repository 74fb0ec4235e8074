"""Compare the demo's answers with the gold labels: python examples/demo.py FOLDER

Prints the accuracy, as `batchmix evaluate evaluate.gold_column=gold` does, and a few rows, and fails below 95 %.
"""

from __future__ import annotations

import sys

import pyarrow.dataset as ds

from batchmix.evaluate import score
from batchmix.output.stored_run import open_stored

NEEDED = 0.95


def main(folder: str) -> int:
    rows = ds.dataset(folder, format="arrow").to_table().sort_by("row").to_pylist()
    for row in rows[:: len(rows) // 4][:4]:
        message = " ".join(row["messages"][0]["content"].split())
        print(f"\n  message  {message[:100]}{'…' * (len(message) > 100)}\n  answer   {row['generated_text']}")
    accuracy = score(open_stored(folder)[0], "gold")
    print(f"\n{accuracy.text()}")
    return int(accuracy.right < NEEDED * accuracy.answers)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
