"""Bad input and bad luck: each ends a command with one line that names what is wrong, and with its exit code."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from messaging.joining import JoinString, read_join
from messaging.keys import new_keys
from messaging.messages import PROTOCOL_VERSION
from tests.support.folders import single_model
from tests.support.sites import POCKET, write_notes
from tools.programs import Done, Hub, Programs


@pytest.fixture(scope="module")
def hub(module_programs: Programs) -> Hub:
    return module_programs.serve()


@pytest.fixture(scope="module")
def member(hub: Hub, module_programs: Programs) -> Path:
    """The state of an edge that is enrolled."""
    state = module_programs.folder / "member"
    module_programs.run("edge", "generate", hub.join, "--state", state, "--max-new-tokens", 1)
    return state


@pytest.fixture(scope="module")
def notes(module_programs: Programs) -> Path:
    return write_notes(module_programs.folder, "clinic", 1, 30)


@pytest.fixture
def run(programs: Programs) -> Callable[..., str]:
    """Run a command that has to fail; its last line on stderr, the only one that tells of the error."""

    def run_it(code: int, *argv: object, installed: bool = False, **more: float) -> str:
        return the_error(programs.run(*argv, code=code, installed=installed, **more))

    return run_it


def the_error(done: Done) -> str:
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done
    assert done.err.splitlines()[-1] == errors[0]
    return errors[0]


Run = Callable[..., str]


# -- the hub ---------------------------------------------------------------------------------------


def test_no_such_model(run: Run, tmp_path: Path) -> None:
    text = run(2, "hub", "serve", "--state", tmp_path / "hub", "--model", tmp_path / "none", installed=True)
    assert str(tmp_path / "none") in text


def test_folder_without_a_model(run: Run, tmp_path: Path) -> None:
    assert "config.json" in run(2, "hub", "serve", "--state", tmp_path / "hub", "--model", tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--dtype", "float8"), "--dtype float8"),
        (("--device", "abacus"), "abacus"),
        (("--listen", "127.0.0.1"), "tcp://HOST:PORT"),
        (("--listen", "tcp://192.0.2.1:0"), "--listen"),
        (("--lr", 0), "--lr"),
        (("--target-modules", "nonsense"), "nonsense"),
        (("--cohort", 2, "--quorum", 1), "--deadline"),
        (("--cohort", 2, "--deadline", 5), "--quorum"),
        (("--cohort", 2, "--quorum", 3, "--deadline", 5), "at most"),
        (("--cohort", 2, "--quorum", 1, "--deadline", "inf"), "--deadline inf"),
    ],
)
def test_bad_options_of_serve(run: Run, tmp_path: Path, options: tuple[object, ...], named: str) -> None:
    assert named in run(2, "hub", "serve", "--state", tmp_path / "hub", *options)


def test_busy_port(run: Run, hub: Hub, tmp_path: Path) -> None:
    port = read_join(hub.join).hub.ctl
    text = run(2, "hub", "serve", "--state", tmp_path / "hub", "--listen", f"tcp://127.0.0.1:{port}")
    assert str(port) in text
    assert "--listen" in text


def test_state_of_another_model(run: Run, hub: Hub, programs: Programs, tmp_path: Path) -> None:
    other = single_model(tmp_path / "model")
    programs.serve("--model", other, state=tmp_path / "hub").process.kill()
    assert "another model" in run(2, "hub", "serve", "--state", tmp_path / "hub")


def test_state_begun_with_another_rank(run: Run, programs: Programs, tmp_path: Path) -> None:
    programs.serve(state=tmp_path / "hub").process.kill()
    assert "lora_rank 8" in run(2, "hub", "serve", "--state", tmp_path / "hub", "--lora-rank", 4)


def test_export_before_anything_is_published(run: Run, hub: Hub, tmp_path: Path) -> None:
    text = run(2, "hub", "export", "--state", hub.state, "--out", tmp_path / "out")
    assert "no published adapter" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["invite", "edges", "status", "export", "revoke"])
def test_no_state_of_a_hub(run: Run, tmp_path: Path, command: str) -> None:
    more = {"export": ("--out", tmp_path / "out"), "revoke": ("ward 3",)}.get(command, ())
    assert "no state of a hub" in run(2, "hub", command, "--state", tmp_path / "none", *more)


def test_revoking_nobody(run: Run, hub: Hub) -> None:
    assert "ward 3" in run(2, "hub", "revoke", "ward 3", "--state", hub.state)


# -- joining ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", ["fedsea1:AAAA", "hello", "fedsea1:%%", "@/nowhere/join.txt"])
def test_malformed_join_string(run: Run, tmp_path: Path, join: str) -> None:
    text = run(2, "edge", "generate", join, "--state", tmp_path / "edge", installed=join == "hello")
    assert "join string" in text


def test_no_join_string_and_no_state(run: Run, tmp_path: Path) -> None:
    assert "give the join string" in run(2, "edge", "generate", "--state", tmp_path / "edge")


def test_made_up_token(run: Run, hub: Hub, tmp_path: Path) -> None:
    join = replace(read_join(hub.join), token=secrets.token_bytes(16))
    assert "hub invite" in run(4, "edge", "generate", join.encode(), "--state", tmp_path / "edge")


def test_join_string_with_another_hubs_key(run: Run, hub: Hub, tmp_path: Path) -> None:
    ticket = read_join(hub.join)
    join = JoinString(replace(ticket.hub, key=new_keys().public), ticket.token)
    assert "another key" in run(4, "edge", "generate", join.encode(), "--state", tmp_path / "edge")


def test_state_of_another_hub(run: Run, hub: Hub, member: Path) -> None:
    ticket = read_join(hub.join)
    join = JoinString(replace(ticket.hub, key=new_keys().public), ticket.token)
    assert "another hub" in run(4, "edge", "generate", join.encode(), "--state", member)


def speak_a_later_version() -> None:
    """In the process of an edge, before it begins: it is of a later version than its hub."""
    import messaging.framing
    import messaging.messages

    later = messaging.messages.PROTOCOL_VERSION + 1
    messaging.messages.PROTOCOL_VERSION = messaging.framing.PROTOCOL_VERSION = later


@pytest.mark.parametrize("enrolled", [False, True])
def test_hub_of_another_version(programs: Programs, hub: Hub, member: Path, tmp_path: Path, enrolled: bool) -> None:
    join, state = ([], member) if enrolled else ([hub.join], tmp_path / "edge")
    process = programs.start("edge", "generate", *join, "--state", state, prepare=speak_a_later_version)
    done = process.wait(20)
    assert done.code == 4, str(process)
    text = the_error(done)
    assert f"version {PROTOCOL_VERSION}" in text
    assert str(PROTOCOL_VERSION + 1) in text
    assert "update" in text


# -- the edge's options and data -------------------------------------------------------------------


def test_no_data(run: Run, member: Path) -> None:
    assert "--data FILE" in run(2, "edge", "join", "--state", member)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.jsonl", "", "empty.jsonl: the file is empty"),
        ("blank.txt", "\n \n", "blank.txt: the file is empty"),
        ("torn.jsonl", '{"text": "a long enough text"}\n{"text": \n', "torn.jsonl:2: is not JSON"),
        ("table.xls", "a", "'.xls'"),
        ("bytes.txt", "na\udcffve", "is not UTF-8"),
        ("full.jsonl", json.dumps({"prompt": "word " * 90, "completion": "end"}) + "\n", "full.jsonl:1: the prompt"),
        ("missing.jsonl", None, "no such file"),
    ],
)
def test_bad_data(run: Run, member: Path, tmp_path: Path, name: str, content: str | None, named: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, errors="surrogateescape")
    text = run(2, "edge", "join", "--state", member, "--data", path, "--seq", 32, "--headless")
    assert named in text.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--partition", "3:3"), "3:3"),
        (("--partition", "0:1"), "0:1"),
        (("--partition", "many"), "p:q"),
        (("--profile", "abacus"), "abacus"),
        (("--model", "nowhere/none"), "nowhere/none"),
        (("--device", "abacus"), "abacus"),
        (("--lr", 0), "--lr"),
        (("--wire", "int4"), "--wire must be one of fp32, bf16, fp16, int8, not int4"),
    ],
)
def test_bad_options_of_join(run: Run, member: Path, notes: Path, options: tuple[object, ...], named: str) -> None:
    assert named in run(2, "edge", "join", "--state", member, "--data", notes, "--headless", *options)


def test_another_model_than_the_hubs(run: Run, member: Path, notes: Path, tmp_path: Path) -> None:
    other = single_model(tmp_path / "model")
    text = run(2, "edge", "join", "--state", member, "--data", notes, "--model", other, "--headless")
    assert str(other) in text


def test_same_shape_with_other_weights(run: Run, member: Path, tmp_path: Path) -> None:
    """A changed copy is refused before anything of it is used."""
    from safetensors.torch import save_file

    copy = tmp_path / "pocket"
    copy.mkdir()
    for path in POCKET.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if "layers.0" in name)
    save_file({**tensors, name: tensors[name] + 1}, copy / "model.safetensors", {"format": "pt"})
    assert name in run(2, "edge", "generate", "--state", member, "--model", copy)


def test_no_room_for_the_tokens_asked_for(run: Run, member: Path) -> None:
    text = run(2, "edge", "generate", "--state", member, "--prompt", "A note", "--max-new-tokens", 512)
    assert "512" in text
    assert "--max-new-tokens" in text


def test_two_trainings_in_one_state(programs: Programs, hub: Hub, notes: Path, run: Run) -> None:
    first = programs.edge(hub, "twice", notes, "--partition", "1:1")
    first.until_says("enroll")
    assert "another `edge join`" in run(2, "edge", "join", "--state", programs.folder / "twice", "--data", notes)


# -- while it works --------------------------------------------------------------------------------


def test_loss_that_is_not_finite(programs: Programs, notes: Path) -> None:
    """It ends that edge alone: what it has on disk is good, and the other edge goes on at once."""
    hub = programs.serve("--cohort", 2, "--round-steps", 4, "--grace", "inf")
    good = programs.edge(hub, "good", notes, "--partition", "1:1", "--steps", 12)
    bad = programs.edge(hub, "bad", notes, "--partition", "1:1", "--lr", 1e30)
    done = bad.wait()
    assert done.code == 5, str(bad)
    text = the_error(done)
    assert re.search(r"step \d is not taken: .*NaN", text, re.IGNORECASE), text
    assert "--lr" in text
    (kept,) = (programs.folder / "bad" / "training").glob("step-[1-9]*.safetensors")
    for name, tensor in load_file(kept).items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.abs().max() < 1e3, name
    assert good.wait().code == 0, str(good)
    assert hub.process.running


@pytest.mark.slow
def test_hub_that_cannot_be_reached(programs: Programs, notes: Path) -> None:
    """An edge that is new, one that is enrolled, and one that trains and may give up: all try for 30 s."""
    hub = programs.serve()
    programs.run("edge", "generate", hub.join, "--state", programs.folder / "member", "--max-new-tokens", 1)
    training = programs.edge(hub, "training", notes, "--partition", "1:1", "--give-up", 30)
    training.until_says("step 1")
    join = read_join(hub.join)
    hub.process.kill()
    new = programs.start("edge", "generate", join.encode(), "--state", programs.folder / "new")
    enrolled = programs.start("edge", "generate", "--state", programs.folder / "member")
    for process in (new, enrolled, training):
        done = process.wait(70)
        assert done.code == 3, str(process)
        assert "is it running" in the_error(done)
    for process in (enrolled, training):
        assert "retrying" in process.out + process.err, str(process)
    assert (programs.folder / "training" / "training").exists()
