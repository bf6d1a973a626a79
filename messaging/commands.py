"""What every command of both sides has in common: errors become one line and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from messaging.errors import FedseaError

#: Ctrl-C, as shells count it.
INTERRUPTED = 130


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a FedseaError into its line on stderr and its exit code, Ctrl-C into 130."""
    try:
        yield
    except FedseaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def quiet_libraries() -> None:
    """No advice and no telemetry from the libraries in the middle of our screen; set before they are imported."""
    warnings.simplefilter("ignore", FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
