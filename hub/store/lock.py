"""One running hub per state: a lock that the kernel gives back however the process ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from hub.store.files import StoreError
from messaging.errors import InputError

#: Whoever asks whether a hub runs holds the lock for an instant: try again for this long before giving up.
_PATIENCE_S = 0.5


class StateLock:
    """Holds the lock file from the constructor's return to `release`. InputError if another process holds it."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from error
        deadline = time.monotonic() + _PATIENCE_S
        while not _try(self._descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
                os.close(self._descriptor)
                raise InputError(
                    f"a hub is already running on {path.parent} (process {holder or 'unknown'}): "
                    "stop it, or give this one another --state"
                )
            time.sleep(_PATIENCE_S / 20)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another hub run. The file stays: removing it would let two hubs lock two files of one name."""
        os.close(self._descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock at this instant."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
