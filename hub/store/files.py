"""Files that appear under their name complete or not at all, whenever the power goes or the process is killed."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from messaging.errors import InputError

#: Temporary files of this module and of `messaging.keys`, and those that safetensors writes beside its target.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\.tmp[0-9A-Za-z]{6}")


class StoreError(InputError):
    """The disk does not do what is asked of it: full, read-only, damaged, or not the hub's at all."""


@contextmanager
def atomic_file(path: Path, mode: int = 0o600, durable: bool = True) -> Iterator[Path]:
    """Hand out a temporary path; what the block writes there becomes `path` when the block ends well.

    With `durable` it is safe on the disk on return. Without, it is still whole for every reader, but a
    power cut may take it back. StoreError if the disk does not take it; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            yield temporary
            os.chmod(temporary, mode)
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            _sync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"cannot write {path}: {reason}") from error


def write_bytes_atomic(path: Path, data: bytes, mode: int = 0o600, durable: bool = True) -> None:
    """Replace `path` by `data` in one piece; see `atomic_file`."""
    with atomic_file(path, mode, durable) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


def sweep_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left behind. Only while nobody else can be writing there."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def make_private_folder(folder: Path) -> None:
    """Make `folder` for its owner alone (0700); one that is there already keeps its mode."""
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync(folder.parent)
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
