"""Key files: private from the first byte, whole or absent, and checked when read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from messaging.errors import InputError, KeyFileError
from messaging.keys import is_key, load_keys, load_or_create_keys, new_keys, save_keys, write_private


def test_saved_keys_come_back_private(tmp_path: Path) -> None:
    keys = new_keys()
    save_keys(tmp_path / "key", keys)
    assert load_keys(tmp_path / "key") == keys
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "key"]
    assert keys.secret not in repr(keys)


def test_private_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(source: Path, target: Path) -> None:
        seen.append((stat.S_IMODE(source.stat().st_mode), source.read_bytes(), target.exists()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", note)
    old = os.umask(0)
    try:
        with pytest.raises(InputError, match="No space left"):
            write_private(tmp_path / "join", b"secret")
    finally:
        os.umask(old)
    assert seen == [(0o600, b"secret", False)]
    assert list(tmp_path.iterdir()) == []


def test_replaces_an_open_file_by_a_private_one(tmp_path: Path) -> None:
    path = tmp_path / "join"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_load_or_create_keeps_an_existing_key(tmp_path: Path) -> None:
    keys = load_or_create_keys(tmp_path / "key")
    assert load_or_create_keys(tmp_path / "key") == keys


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_others_may_not_read_it(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    save_keys(path, new_keys())
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_keys(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    save_keys(path, new_keys())
    good = path.read_bytes()
    one, other = new_keys(), new_keys()
    swapped = f"fedsea key 1\npublic {one.public}\nsecret {other.secret}\n".encode()
    for content in (
        b"",
        good[:-1],
        good[:-20] + b"\n",
        good + b"x",
        b"\xff" * 90,
        good.replace(b"1", b"2", 1),
        swapped,
    ):
        path.write_bytes(content)
        with pytest.raises(KeyFileError):
            load_keys(path)
    with pytest.raises(KeyFileError, match="No such file"):
        load_keys(tmp_path / "absent")
    with pytest.raises(InputError, match="No such file"):
        save_keys(tmp_path / "no" / "folder", one)


def test_what_is_a_key() -> None:
    assert is_key(new_keys().public)
    for text in ("", "x" * 39, "x" * 41, " " * 40, "#" * 40, "ü" * 40):
        assert not is_key(text)
