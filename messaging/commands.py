"""What every command of both sides has in common: errors become one line and an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from messaging.console.figures import printable
from messaging.errors import FedseaError

#: Ctrl-C, as shells count it.
INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does, but was meant, and so the exit code is 0."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a FedseaError into its line on stderr and its exit code, Ctrl-C into 130, SIGTERM into 0."""
    try:
        yield
    except FedseaError as error:
        # The text may have come off the wire; no escape sequence in it may steer the terminal.
        print("\n".join(map(printable, f"error: {error}".splitlines())), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        print("terminated" if terminated else "interrupted", file=sys.stderr)
        sys.exit(0 if terminated else INTERRUPTED)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated in here. For the main thread."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def quiet_libraries() -> None:
    """No advice and no telemetry from the libraries in the middle of our screen; set before they are imported."""
    warnings.simplefilter("ignore", FutureWarning)
    # torchao, where it is installed: kernels for other machines, and what torch has to tell its authors
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
