"""Checkpoints and published adapters: bit-exact, two or five of them, and never torn."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hub.store.checkpoints import Checkpoint
from hub.store.files import StoreError
from hub.store.state import HubState
from messaging.messages import Recipe

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(1e-3, 8, 16.0, ("self_attn.q_proj",), 20, 3, 2, 1.0, 0, 0.0, 7)
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[HubState]:
    with HubState.open(tmp_path / "state", exclusive=True) as opened:
        yield opened


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        hub_step=step,
        round=step // 10,
        round_step=step % 10,
        version=step // 10,
        applied={"key one": step, "key two": step - 1},
        adapter={NAME: torch.randn(4, 6, generator=generator)},
        optimizer={"|steps": torch.tensor(step), f"{NAME}|exp_avg": torch.randn(4, 6, generator=generator)},
        extra={"rng": [1, 2], "tokens": {"key one": 5}},
    )


def assert_same(one: Checkpoint | None, other: Checkpoint) -> None:
    assert one is not None
    for name in ("hub_step", "round", "round_step", "version", "applied", "extra"):
        assert getattr(one, name) == getattr(other, name)
    for mine, theirs in ((one.adapter, other.adapter), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name])


def test_nothing_comes_back_from_nothing(state: HubState) -> None:
    assert state.checkpoints.load_latest() == (None, [])
    assert state.checkpoints.latest() is None
    assert state.adapters.latest() is None


def test_a_checkpoint_comes_back_bit_for_bit_and_two_are_kept(state: HubState) -> None:
    for step in (5, 10, 15):
        state.checkpoints.save(checkpoint(step))
    loaded, warnings = state.checkpoints.load_latest()
    assert_same(loaded, checkpoint(15))
    assert warnings == []
    assert sorted(os.listdir(state.folder / "checkpoints")) == ["ckpt-2.safetensors", "ckpt-3.safetensors"]
    latest = state.checkpoints.latest()
    assert latest is not None
    assert latest.note == {"hub_step": 15, "round": 1, "round_step": 5, "version": 1}


def test_views_and_other_dtypes_are_stored_as_values(state: HubState) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    given = Checkpoint(
        1, 0, 1, 0, {}, {"a": whole.t(), "b": whole[1:3].bfloat16()}, {"c": whole[0], "d": whole[1], "e": whole}
    )
    state.checkpoints.save(given)
    loaded, _ = state.checkpoints.load_latest()
    assert loaded is not None
    assert torch.equal(loaded.adapter["a"], whole.t())
    assert loaded.adapter["b"].dtype == torch.float32
    assert torch.equal(loaded.optimizer["d"], whole[1])


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "empty"])
def test_a_spoiled_checkpoint_is_skipped_with_a_warning(state: HubState, damage: str) -> None:
    state.checkpoints.save(checkpoint(1))
    path = state.checkpoints.save(checkpoint(2)).path
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        spoiled: dict[str, bytes | bytearray] = {"cut": data[:-10], "bit": data, "empty": b""}
        path.write_bytes(spoiled[damage])
    loaded, warnings = state.checkpoints.load_latest()
    assert_same(loaded, checkpoint(1))
    assert len(warnings) == 1
    assert "ckpt-2.safetensors is " in warnings[0]
    # and the next one takes a number of its own
    state.checkpoints.save(checkpoint(3))
    assert_same(state.checkpoints.load_latest()[0], checkpoint(3))


def test_a_file_that_is_no_checkpoint_is_skipped_too(state: HubState) -> None:
    state.checkpoints.save(checkpoint(1))
    entry = state.checkpoints.save(checkpoint(2))

    def nonsense(path: Path) -> None:
        path.write_bytes(b"nonsense")

    state.checkpoints._series.add(entry.number, nonsense, {})
    loaded, warnings = state.checkpoints.load_latest()
    assert_same(loaded, checkpoint(1))
    assert "cannot be read" in warnings[0]


def test_with_no_sound_checkpoint_left_people_decide(state: HubState) -> None:
    paths = [state.checkpoints.save(checkpoint(step)).path for step in (1, 2)]
    for path in paths:
        path.write_bytes(b"spoiled")
    with pytest.raises(StoreError, match="no checkpoint can be used"):
        state.checkpoints.load_latest()
    for path in paths:
        path.unlink()
    loaded, warnings = state.checkpoints.load_latest()
    assert loaded is None
    assert len(warnings) == 2


def test_a_file_that_was_never_listed_is_not_there(state: HubState) -> None:
    """As after a kill between the rename and the commit: the next save takes its place."""
    first = state.checkpoints.save(checkpoint(1))
    torn = first.path.with_name("ckpt-2.safetensors")
    torn.write_bytes(first.path.read_bytes())
    assert_same(state.checkpoints.load_latest()[0], checkpoint(1))
    state.checkpoints.save(checkpoint(2))
    assert_same(state.checkpoints.load_latest()[0], checkpoint(2))


def test_a_start_sweeps_what_killed_writers_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with HubState.open(tmp_path, exclusive=True) as state:
        for step in (1, 2, 3):
            state.checkpoints.save(checkpoint(step))
    stray = [".tmpA1b2C3", ".ckpt-4.safetensors.0123456789abcdef.tmp", "ckpt-1.safetensors"]
    for name in [*stray, "ckpt-4.safetensors", "notes.txt"]:
        (folder / name).write_bytes(b"x")
    HubState.open(tmp_path, exclusive=True).close()
    kept = ["ckpt-2.safetensors", "ckpt-3.safetensors", "ckpt-4.safetensors", "notes.txt"]
    assert sorted(os.listdir(folder)) == kept


def test_a_full_disk_leaves_the_last_checkpoint(state: HubState, monkeypatch: pytest.MonkeyPatch) -> None:
    state.checkpoints.save(checkpoint(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(StoreError, match="No space left"):
            state.checkpoints.save(checkpoint(2))
    assert_same(state.checkpoints.load_latest()[0], checkpoint(1))
    assert os.listdir(state.folder / "checkpoints") == ["ckpt-1.safetensors"]


def publish(state: HubState, version: int, *pinned: int) -> None:
    state.adapters.publish(version, version + 10, {NAME: torch.full((2, 3), float(version))}, RECIPE, pinned)


def versions(state: HubState) -> list[int]:
    return sorted(int(path.stem[1:]) for path in (state.folder / "adapters").iterdir())


def test_published_adapters(state: HubState) -> None:
    publish(state, 0)
    publish(state, 1)
    latest = state.adapters.latest()
    assert latest is not None
    assert (latest.version, latest.round, latest.recipe) == (1, 11, RECIPE)
    assert torch.equal(latest.tensors()[NAME], torch.ones(2, 3))
    assert latest.bytes == latest.path.stat().st_size
    with safe_open(latest.path, framework="pt") as file:
        assert list(file.keys()) == [NAME]
        assert '"version": 1' in file.metadata()["fedsea"]
    old = state.adapters.get(0)
    assert old is not None
    assert torch.equal(old.tensors()[NAME], torch.zeros(2, 3))
    assert state.adapters.get(2) is None


def test_five_are_kept_and_the_pinned_ones(state: HubState) -> None:
    for version in range(8):
        publish(state, version, 1)
    assert versions(state) == [1, 3, 4, 5, 6, 7]
    publish(state, 8)
    assert versions(state) == [4, 5, 6, 7, 8]


def test_a_version_may_be_published_again_and_rewound(state: HubState) -> None:
    publish(state, 1)
    publish(state, 2)
    again = state.adapters.publish(2, 3, {NAME: torch.full((2, 3), 9.0)}, RECIPE)
    assert torch.equal(again.tensors()[NAME], torch.full((2, 3), 9.0))
    latest = state.adapters.latest()
    assert latest == again
    state.adapters.rewind(1)
    assert versions(state) == [1]


def test_a_spoiled_adapter_is_a_named_error(state: HubState) -> None:
    publish(state, 1)
    latest = state.adapters.latest()
    assert latest is not None
    latest.path.write_bytes(b"spoiled")
    with pytest.raises(StoreError, match="not as long"):
        latest.tensors()


# A process that forks hubs and kills them; each writes as fast as it can and says how far it got.
_KILLS = """
import mmap, os, pathlib, random, signal, struct, sys, time
import torch
from hub.store.checkpoints import Checkpoint
from hub.store.state import HubState
from tests_recipe import RECIPE

folder, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
done = mmap.mmap(-1, 16)

def hub():
    with HubState.open(folder, exclusive=True) as state:
        state.next_epoch()
        loaded, _ = state.checkpoints.load_latest()
        step = loaded.hub_step if loaded else 0
        while True:
            step += 1
            tensors = {name: torch.full((50_000,), float(step)) for name in "ab"}
            state.adapters.publish(step, step, tensors, RECIPE)
            state.checkpoints.save(Checkpoint(step, step, 0, step, {"key": step}, tensors, tensors))
            done[:8] = struct.pack("q", step)

random.seed(1)
promised = 0
for turn in range(kills):
    child = os.fork()
    if child == 0:
        try:
            hub()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    # Where the disk is slow, until it gets to write at all.
    time.sleep(random.uniform(0.02, 0.2) * (1 if promised else 1 + turn))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"
    promised = struct.unpack("q", done[:8])[0]
    with HubState.open(folder, exclusive=True) as state:
        point, warnings = state.checkpoints.load_latest()
        assert not warnings, warnings
        assert (point.hub_step if point else 0) in (promised, promised + 1)
        done[:8] = struct.pack("q", point.hub_step if point else 0)
        if point:
            assert point.applied == {"key": point.hub_step} and point.version == point.hub_step
            for tensors in (point.adapter, point.optimizer, state.adapters.get(point.version).tensors()):
                assert all((value == point.hub_step).all() and len(value) == 50_000 for value in tensors.values())
        names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").exists() else []
        assert len(names) <= 3 and not any(name.startswith(".") for name in names), names
        assert state.epoch() <= turn + 1
print(promised)
"""


def test_no_kill_tears_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tests_recipe.py").write_text(f"from messaging.messages import Recipe\nRECIPE = {RECIPE!r}\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _KILLS, str(tmp_path / "state"), "20"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # it did get to write
