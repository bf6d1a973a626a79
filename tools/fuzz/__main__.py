"""Fuzz one entry point, guided by coverage.

    python -m tools.fuzz {decode,layout,join_string,upload,planes} [--seconds N] [--corpus DIR] [--crashes DIR]

Ends with one line of figures and exit status 0 when nothing was found; with the file that holds the input and 1 when
something raised an error that it must not raise, or took more than 100 ms or 50 MB. Needs atheris, which exists for
Linux. A corpus folder is added to, so that the next run begins where this one ended.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.fuzz.run import fuzz, why_not
from tools.fuzz.targets import NAMES


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="how long (default 60)")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="inputs to begin with; new ones are added")
    parser.add_argument("--crashes", type=Path, default=Path("."), metavar="DIR", help="where an input that fails goes")
    given = parser.parse_args(arguments)
    if reason := why_not():
        print(f"cannot fuzz: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="fedsea-fuzz-") as folder:
        corpus = given.corpus or Path(folder) / "corpus"
        outcome = fuzz(given.target, given.seconds, corpus, given.crashes.resolve())
    print(
        f"{given.target}: {outcome.executions} executions in {given.seconds} s, "
        f"worst {outcome.worst_ms:.1f} ms of CPU time, worst {outcome.worst_mb:.1f} MB"
    )
    if outcome.crash is not None:
        print(outcome.said)
        print(f"failed on the input in {outcome.crash}")
    return 0 if outcome.crash is None else 1


if __name__ == "__main__":
    sys.exit(main())
