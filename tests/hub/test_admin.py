"""The commands beside `hub serve`, with a hub running and without."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hub import admin
from hub.monitor.snapshot import EdgeRow, HubSnapshot
from hub.store.checkpoints import Checkpoint
from hub.store.state import HubState, ModelInfo
from messaging.errors import InputError, Refused
from messaging.joining import HubAddress, JoinString
from messaging.keys import new_keys
from messaging.messages import Recipe

RECIPE = Recipe(1e-3, 4, 8.0, ("self_attn.q_proj",), 20, 3, 2, float("inf"), 0, 0.0, 7)
MODEL = ModelInfo("some/base", "ab" * 32, "f32", 6, False)
ADDRESS = HubAddress("127.0.0.1", 5001, 5002, 5003, new_keys().public)
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def shown(show: Callable[[dict[str, Any], Console], None], data: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(data, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state that a hub has run on."""
    with HubState.open(tmp_path / "state", exclusive=True) as state:
        state.next_epoch()
        state.set_address(ADDRESS)
        state.set_training(MODEL, RECIPE)
    return tmp_path / "state"


@pytest.mark.parametrize("running", [False, True])
def test_an_invitation_enrols_at_the_hub(folder: Path, running: bool) -> None:
    hub = HubState.open(folder, exclusive=True) if running else None
    data = admin.invite(folder, uses=2, ttl_s=60)
    text = shown(admin.show_invite, data, width=40)
    assert text.splitlines()[0] == data["join"]  # unbroken on a narrow terminal
    assert ("the hub is stopped" in text) is not running
    assert 0 < data["expires_at"] - time.time() <= 60
    join = JoinString.parse(data["join"])
    assert join.hub == ADDRESS
    hub = hub or HubState.open(folder, exclusive=True)
    with hub:
        for name in ("a", "b"):
            hub.access.enrol(join.token, new_keys().public, name)
        with pytest.raises(Refused):
            hub.access.enrol(join.token, new_keys().public, "c")


def test_an_invitation_needs_a_hub_that_ran(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no state"):
        admin.invite(tmp_path)
    HubState.open(tmp_path, exclusive=True).close()
    with pytest.raises(InputError, match="no hub has run"):
        admin.invite(tmp_path)


def test_edges_and_revoke(folder: Path) -> None:
    assert "no edge is enrolled" in shown(admin.show_edges, admin.edges(folder))
    key = new_keys().public
    with HubState.open(folder, exclusive=True) as hub:
        token = hub.access.invite(uses=2)
        hub.access.enrol(token, key, "clinic")
        hub.access.enrol(token, new_keys().public, "bank")
        hub.access.record_seen([key])
        revoked = admin.revoke(folder, "bank")
        assert revoked["name"] == "bank"
        assert "bank is revoked" in shown(admin.show_revoke, revoked)
        with pytest.raises(InputError, match="there are: clinic"):
            admin.revoke(folder, "nobody")
    data = admin.edges(folder)
    assert [(edge["name"], edge["revoked_at"] is None) for edge in data["edges"]] == [("clinic", True), ("bank", False)]
    lines = shown(admin.show_edges, data).splitlines()
    assert "clinic" in lines[1]
    assert "may connect" in lines[1]
    assert "never" in lines[2]
    assert "revoked 20" in lines[2]


def test_status_of_a_running_and_of_a_stopped_hub(folder: Path) -> None:
    assert shown(admin.show_status, admin.status(folder)).startswith("stopped\n")
    with HubState.open(folder, exclusive=True) as hub:
        assert admin.status(folder)["running"]
        hub.checkpoints.save(Checkpoint(7, 1, 2, 1, {}, {NAME: torch.ones(4, 8)}, {}))
        hub.adapters.publish(1, 1, {NAME: torch.ones(4, 8)}, RECIPE)
        row = EdgeRow(
            "clinic", "1:1", "training", tokens_per_s=12.0, loss=float("nan"), noise_sigma=0.025, noise_r=0.02
        )
        hub.write_status(asdict(HubSnapshot("pocket", "f32", "training", round=2, edges=(row,))))
        data = admin.status(folder)
    assert (data["running"], data["silent_s"]) == (True, None)
    assert data["process"] == os.getpid()
    assert data["live"]["round"] == 2
    assert data["live"]["edges"][0]["loss"] is None
    assert data["stored"]["checkpoint"]["hub_step"] == 7
    assert data["stored"]["adapter"]["version"] == 1
    assert data["stored"]["recipe"]["clip_norm"] is None
    json.dumps(data, allow_nan=False)
    text = shown(admin.show_status, data, width=80)
    assert text.startswith(f"running (process {os.getpid()})\n")
    assert "checkpoint  step 7, 1 round done" in text
    assert "clinic" in text
    assert "0.025" in text
    stopped = admin.status(folder)
    assert not stopped["running"]
    assert shown(admin.show_status, stopped).startswith("stopped; last heard of 20")
    assert "clinic" not in shown(admin.show_status, stopped)  # what was live is history


def test_status_of_a_hub_of_another_version(folder: Path) -> None:
    with HubState.open(folder, exclusive=True) as hub:
        hub.write_status({"something": "new"})
        assert shown(admin.show_status, admin.status(folder)).startswith("running (process")


def test_a_hub_that_hangs_is_called_silent(folder: Path) -> None:
    with HubState.open(folder, exclusive=True, clock=lambda: time.time() - 30) as hub:
        hub.write_status({})
        data = admin.status(folder)
    assert 29 < data["silent_s"] < 40
    assert "silent for 30 s" in shown(admin.show_status, data)
    assert admin.status(folder)["silent_s"] is None  # a stopped one is not silent but stopped


def test_export_writes_the_last_published_adapter(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no published adapter yet") as refused:
        admin.export(folder, out)
    assert refused.value.exit_code == 2
    assert not out.exists()
    with HubState.open(folder, exclusive=True) as hub:
        for version in (1, 2):
            hub.adapters.publish(version, version, {NAME: torch.full((4, 8), float(version))}, RECIPE)
        data = admin.export(folder, out)
    assert data == {"out": str(out), "version": 2, "round": 2, "base_model": "some/base"}
    assert "version 2 of round 2" in shown(admin.show_export, data)
    from safetensors.torch import load_file

    assert torch.equal(load_file(out / "adapter_model.safetensors")[NAME], torch.full((4, 8), 2.0))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("0.5h", 1800)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert admin.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "1 h", "1w", "inf", "nan", "1e9", "10m5s"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(InputError, match="10m or 2h"):
        admin.seconds(text)


def test_an_invitation_for_a_name_and_the_list_of_those_that_are_open(folder: Path) -> None:
    data = admin.invite(folder, ttl_s=3600, name="clinic")
    assert "good for 1 edge, which gets the name clinic, until" in shown(admin.show_invite, data)
    admin.invite(folder, uses=3)
    listed = admin.edges(folder)
    assert [(open_["uses_left"], open_["name"]) for open_ in listed["invitations"]] == [(3, None), (1, "clinic")]
    text = shown(admin.show_edges, listed)
    assert "an invitation for 3 edges is open until" in text
    assert "an invitation for the name clinic is open until" in text
    assert JoinString.parse(data["join"]).token.hex() not in json.dumps(listed)


def test_edges_with_open_sessions(folder: Path) -> None:
    with HubState.open(folder, exclusive=True) as hub:
        token = hub.access.invite(uses=2)
        for name in ("clinic", "bank"):
            hub.access.enrol(token, new_keys().public, name)
        row = EdgeRow("clinic", "1:1", "training", sessions=2)
        hub.write_status(asdict(HubSnapshot("pocket", "f32", "training", edges=(row,))))
        listed = admin.edges(folder)
        assert [edge["sessions"] for edge in listed["edges"]] == [2, 0]
        assert "here, 2 sessions" in shown(admin.show_edges, listed)
    assert [edge["sessions"] for edge in admin.edges(folder)["edges"]] == [0, 0], "a stopped hub has none"


def test_rotate_key_says_who_was_not_here_since(folder: Path) -> None:
    with HubState.open(folder, exclusive=True) as hub:
        keys = {name: new_keys().public for name in ("clinic", "bank", "gone")}
        token = hub.access.invite(uses=3)
        for name, key in keys.items():
            hub.access.enrol(token, key, name)
        hub.access.record_seen(keys.values())
        hub.access.revoke("gone")
        data = admin.rotate_key(folder)
        assert data["untold"] == ["clinic", "bank"]
        assert "not here since" in shown(admin.show_rotate_key, data)
        hub.access.record_seen(keys.values())
        again = admin.rotate_key(folder)
        assert (again["key"], again["untold"]) == (data["key"], [])
        assert "restart the hub when it suits you" in shown(admin.show_rotate_key, again)
    assert "need a new join string" in shown(admin.show_rotate_key, admin.rotate_key(folder))


def test_the_audit_log_is_shown(folder: Path) -> None:
    assert "nothing has happened yet" in shown(admin.show_audit, admin.audit(folder, 5))
    for number in range(4):
        admin.invite(folder, name=f"edge-{number}")
    with HubState.open(folder, exclusive=True) as hub:
        hub.audit.write("enrolment refused", name="evil", reason="\x1b[31mred")
    data = admin.audit(folder, 3)
    assert [event.get("name") for event in data["events"]] == ["edge-2", "edge-3", "evil"]
    text = shown(admin.show_audit, data, width=30)
    assert len(text.splitlines()) == 3
    assert "\x1b" not in text


def test_an_invitation_has_the_key_that_the_hub_will_have(folder: Path) -> None:
    with HubState.open(folder, exclusive=True) as hub:
        announced, _ = hub.rotate_keys()
        assert JoinString.parse(admin.invite(folder)["join"]).hub == ADDRESS
    assert JoinString.parse(admin.invite(folder)["join"]).hub == replace(ADDRESS, key=announced)
