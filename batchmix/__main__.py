"""`python -m batchmix JOB ...` is the command `batchmix JOB ...`."""

import sys

from batchmix.cli import main

if __name__ == "__main__":
    sys.exit(main())
