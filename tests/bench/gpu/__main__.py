"""Measure on a GPU what cannot be measured on a CPU, one JSON file per part.

    python -m tests.bench.gpu OUT                              # all parts
    python -m tests.bench.gpu OUT --parts steps vlm_3b         # those whose names begin so
    python -m tests.bench.gpu OUT --tiny                       # tiny shapes, on a CPU if there is no GPU: does each part run?

Each part runs in a new process and takes less than 4 minutes on an H100. A part is skipped if its file was made by the same source,
commit, settings, versions and device. So the same command continues after an interruption. A cell that fails has its error in the
file, and the others go on. `--list` prints the names and what each part answers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder of the results")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="names, or their beginnings. Default: all")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a part is ended")
    parser.add_argument("--list", action="store_true", help="print the parts")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from tests.bench.gpu import running

    if options.list:
        running.print_parts()
    elif options.out is None:
        parser.error("OUT is missing")
    elif options.one:
        running.run_part(options.out, options.one, tiny=options.tiny)
    else:
        sys.exit(running.run_parts(options.out, options.parts, tiny=options.tiny, limit=options.limit))


if __name__ == "__main__":
    main()
