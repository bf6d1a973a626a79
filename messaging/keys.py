"""CURVE key pairs, and the files that hold secrets.

A key is written as Z85, 40 characters. An edge's public key is its identity at the hub. Secret files are
private (0600) from their first byte on, and appear under their name complete or not at all.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from messaging.errors import InputError, KeyFileError

_HEAD = "fedsea key 1"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_Z85 = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, both keys as Z85."""

    public: str
    secret: str = field(repr=False)


def new_keys() -> KeyPair:
    """A fresh key pair from the operating system's random numbers."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def is_key(text: str) -> bool:
    """Whether `text` is a key in Z85."""
    if not _Z85.fullmatch(text):
        return False
    try:
        return len(z85.decode(text)) == 32
    except struct.error:  # five characters may stand for more than the 32 bits that the decoder can pack
        return False


def save_keys(path: Path, keys: KeyPair) -> None:
    """Write a key pair to `path`, replacing what is there."""
    write_private(path, f"{_HEAD}\npublic {keys.public}\nsecret {keys.secret}\n".encode())


def load_keys(path: Path) -> KeyPair:
    """Read what `save_keys` wrote. KeyFileError if others may read it or it is not a matching pair."""
    content = read_private(path)
    match = re.fullmatch(rf"{_HEAD}\npublic (\S+)\nsecret (\S+)\n", content.decode("ascii", "replace"))
    if match is None or not (is_key(match[1]) and is_key(match[2])):
        raise KeyFileError(f"{path} is not a key file of FedSEA: restore it, or move it away and join again")
    if zmq.curve_public(match[2].encode()).decode() != match[1]:
        raise KeyFileError(f"the two keys in {path} do not belong together: restore it, or move it away and join again")
    return KeyPair(match[1], match[2])


def read_private(path: Path) -> bytes:
    """Read a file with a secret. KeyFileError if others may read it, or it cannot be read."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(1024)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from error
    if mode & 0o077:
        raise KeyFileError(f"others may read the secret key in {path} (mode {mode:o}): run `chmod 600 {path}`")
    return content


def load_or_create_keys(path: Path) -> KeyPair:
    """The key pair in `path`, made now if there is no such file."""
    if path.exists():
        return load_keys(path)
    keys = new_keys()
    save_keys(path, keys)
    return keys


def take_over_keys(successor: Path, path: Path) -> None:
    """Put the key file `successor` in the place of `path`, in one step that is safe on the disk on return.

    InputError if that cannot be done there.
    """
    try:
        os.replace(successor, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot put {successor} in the place of {path}: {error.strerror}") from error


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read: whole or not at all, and safe on the disk on return.

    InputError if that cannot be done there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def sweep_private(folder: Path, older_than_s: float = 0.0) -> None:
    """Remove what `write_private` leaves in a folder when the process is killed, if it is older than so many seconds.

    InputError if that cannot be done there.
    """
    try:
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink(missing_ok=True)
    except FileNotFoundError:
        # It was finished, or swept by another process, just now; what is left is swept the next time.
        return
    except OSError as error:
        raise InputError(f"cannot clean up {folder}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
