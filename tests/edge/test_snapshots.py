"""Snapshots on disk: what is kept, what is found again, what a spoiled one says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edge.snapshots import Snapshot, Snapshots, Standing
from messaging.errors import InputError

START = Standing(0, 0, 0, 0, 0, False, (), -1, "hash", "1:1")


@pytest.fixture
def snapshots(tmp_path: Path) -> Iterator[Snapshots]:
    found = Snapshots(tmp_path / "training")
    yield found
    found.close()


def at(steps: int, round_: int = 0) -> Snapshot:
    """A snapshot whose tensors say which it is."""
    value = float(100 * round_ + steps)
    standing = replace(START, steps=steps, round=round_, held_out=(1.5, 2.5))
    return Snapshot(standing, {"a": torch.full((2,), value)}, {"|steps": torch.tensor(steps)})


def steps_kept(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "training").iterdir())


def test_a_snapshot_comes_back_as_it_was(snapshots: Snapshots) -> None:
    snapshots.put(at(3, 1), 0)
    snapshots.wait()
    newest = snapshots.newest()
    assert newest == at(3, 1).standing
    back = snapshots.at(3, 1)
    assert back is not None
    assert back.standing == newest
    assert torch.equal(back.adapter["a"], torch.full((2,), 103.0))
    assert int(back.optimizer["|steps"]) == 3


def test_the_newest_and_those_of_the_two_latest_checkpoints_are_kept(snapshots: Snapshots, tmp_path: Path) -> None:
    for steps, checkpoint in ((0, 0), (1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4), (7, 4)):
        snapshots.put(at(steps), checkpoint)
    snapshots.wait()
    assert steps_kept(tmp_path) == ["step-2-round-0", "step-4-round-0", "step-7-round-0"]


def test_what_an_earlier_process_left_is_kept_until_two_checkpoints_are_known(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    for steps in range(4):
        snapshots.put(at(steps), min(steps, 2))
    snapshots.wait()
    before = steps_kept(tmp_path)
    again = Snapshots(tmp_path / "training")
    again.put(at(4), 2)
    again.wait()
    assert set(before) <= set(steps_kept(tmp_path))
    again.put(at(5), 4)
    again.put(at(6), 4)
    again.close()
    assert steps_kept(tmp_path) == ["step-2-round-0", "step-4-round-0", "step-6-round-0"]


def test_the_round_of_the_hub_chooses_between_two_of_the_same_step(snapshots: Snapshots) -> None:
    for round_ in (0, 1):
        snapshots.put(at(8, round_), 8)
    snapshots.wait()
    for round_, found in ((0, 0), (1, 1), (2, 1)):
        snapshot = snapshots.at(8, round_)
        assert snapshot is not None
        assert snapshot.standing.round == found
    assert snapshots.at(8, 3) is None
    assert snapshots.at(7, 1) is None


def test_the_newest_is_of_the_latest_round(snapshots: Snapshots) -> None:
    assert snapshots.newest() is None
    snapshots.put(at(9, 0), 9)
    snapshots.put(at(9, 1), 9)
    snapshots.wait()
    newest = snapshots.newest()
    assert newest is not None
    assert newest.round == 1


def test_a_spoiled_one_is_named(snapshots: Snapshots, tmp_path: Path) -> None:
    snapshots.put(at(1), 0)
    snapshots.wait()
    path = tmp_path / "training" / "step-1-round-0.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"step-1-round-0.*damaged.*remove it"):
        snapshots.newest()


def test_a_disk_that_does_not_take_it_is_told_before_the_next_step(
    snapshots: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise InputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("edge.snapshots.write_private", full)
    snapshots.put(at(1), 0)
    with pytest.raises(InputError, match="No space left"):
        snapshots.wait()


def test_what_a_hub_went_back_to_is_kept_when_it_is_killed_again_before_its_next_checkpoint_is_whole(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    for steps, checkpoint in ((10, 8), (11, 10), (14, 10), (15, 14)):
        snapshots.put(at(steps), checkpoint)
    # The hub was killed while it wrote the checkpoint of step 14, and goes on from that of step 10.
    snapshots.drop_after(at(10).standing)
    for steps, checkpoint in ((11, 10), (12, 10), (13, 12), (14, 12)):
        snapshots.put(at(steps), checkpoint)
    snapshots.wait()
    # Nor is it known of the checkpoint of step 12 that it is whole.
    assert {"step-10-round-0", "step-12-round-0"} <= set(steps_kept(tmp_path))
