"""Files are whole or not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hub.store.files import StoreError, atomic_file, make_private_folder, sweep_temporaries, write_bytes_atomic


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_and_private(tmp_path: Path) -> None:
    path = tmp_path / "join"
    path.write_text("old")
    path.chmod(0o644)
    write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert mode_of(path) == 0o600
    assert os.listdir(tmp_path) == ["join"]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def half() -> None:
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"cannot write .*/x: No space left on device"):
        half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_is_not_there_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        write_bytes_atomic(tmp_path / "no" / "x", b"")


@pytest.mark.parametrize(("durable", "order"), [(True, ["sync file", "replace", "sync folder"]), (False, ["replace"])])
def test_the_data_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, order: list[str]
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_bytes_atomic(tmp_path / "x", b"data", durable=durable)
    assert calls == order


def test_the_sweep_takes_temporaries_and_nothing_else(tmp_path: Path) -> None:
    stray = [".hub.key.0123456789abcdef.tmp", ".ckpt-3.safetensors.0123456789abcdef.tmp", ".tmpA1b2C3"]
    own = ["ckpt-3.safetensors", "notes.tmp", ".hidden", ".tmp", "tmpA1b2C3"]
    for name in stray + own:
        (tmp_path / name).write_bytes(b"")
    sweep_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(own)


def test_a_new_folder_is_private_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "a" / "b")
    assert mode_of(tmp_path / "a" / "b") == 0o700
    (tmp_path / "old").mkdir(mode=0o755)
    make_private_folder(tmp_path / "old")
    assert mode_of(tmp_path / "old") == 0o755


def test_a_file_in_the_place_of_the_folder_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the folder"):
        make_private_folder(tmp_path / "file")
