"""Compare the demo's answers with the gold labels: python examples/demo.py FOLDER

Prints the accuracy and a few rows, and fails below 95 %.
"""

from __future__ import annotations

import sys

import pyarrow.dataset as ds

NEEDED = 0.95


def main(folder: str) -> int:
    rows = ds.dataset(folder, format="arrow").to_table().sort_by("row").to_pylist()
    for row in rows[:: len(rows) // 4][:4]:
        message = " ".join(row["messages"][0]["content"].split())
        print(f"\n  message  {message[:100]}{'…' * (len(message) > 100)}\n  answer   {row['generated_text']}")
    right = sum(row["generated_text"] == row["gold"] for row in rows)
    print(f"\naccuracy: {right:,} of {len(rows):,} answers exactly right ({right / len(rows):.1%})")
    return int(right < NEEDED * len(rows))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
