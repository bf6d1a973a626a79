"""The hub's screen at several sizes, and as one line."""

import dataclasses
import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from hub.monitor import VIEW, EdgeRow, HubSnapshot, ReplicaRow
from hub.monitor.snapshot import from_fields
from messaging.console.dump import read_snapshot, write_snapshot

EDGES = (
    EdgeRow("clinic-north", "2:1", "training", 612.4, 11.2, 2.314, 0.02507, 0.41, 0, 0.4),
    EdgeRow("東京病院", "1:1", "generating", 31.2, 82.0, None, 0.05, 1.25, 3, 1.0),
    EdgeRow("ward-3", "1:3", "training", silent_s=31),
)
SNAPSHOT = HubSnapshot(
    model="Llama-3.2-1B",
    dtype="bfloat16",
    phase="training",
    first_layer=1,
    last_layer=14,
    layers=16,
    endpoints=("tcp://10.0.0.5:7700", "tcp://10.0.0.5:7701"),
    uptime_s=192,
    adapter_version=3,
    round=2,
    rounds=5,
    round_step=13,
    round_steps=20,
    hub_step=1033,
    cohort_joined=2,
    cohort_size=2,
    edges=EDGES,
    edges_per_step=2.0,
    sessions_per_decode=3.42,
    queued=4,
    streams=7,
    kv_bytes=1 << 30,
    kv_budget_bytes=4 << 30,
    bytes_in=3 << 20,
    bytes_out=5 << 30,
    bytes_in_per_s=2048,
    bytes_out_per_s=4096,
    log=tuple(f"12:00:{second:02d} line {second}" for second in range(40)),
)
REPLICATED = dataclasses.replace(
    SNAPSHOT,
    replicas=(
        *(ReplicaRow(f"replica {n}", f"gpu-{n}, process 4{n}", "training", 3, 1, 517, 13, 2) for n in range(1, 12)),
        ReplicaRow("replica 12", "gpu-12, process 99", "starting again", 2, 0, 480, 10, 0),
    ),
)
FRESH = HubSnapshot(model="pocket", dtype="float32", phase="waiting for edges 0/2", cohort_size=2)


def drawn(snapshot: HubSnapshot, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(VIEW.render(snapshot, width, height))
    return console.file.getvalue().splitlines()


def many(count: int) -> HubSnapshot:
    healthy = tuple(EdgeRow(f"edge-{at}", "1:1", "training") for at in range(count - 1))
    return dataclasses.replace(SNAPSHOT, edges=(*healthy, EDGES[2]))


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize(
    "snapshot", [SNAPSHOT, FRESH, many(50), REPLICATED], ids=["training", "fresh", "many", "replicas"]
)
def test_every_line_fills_the_frame_and_none_sticks_out(snapshot, width):
    assert {cell_len(line) for line in drawn(snapshot, width, 40)} == {min(width, 120)}


@pytest.mark.parametrize("width", [1, 10, 20, 30])
def test_a_tiny_terminal_is_no_error(width):
    assert all(cell_len(line) <= width for line in drawn(SNAPSHOT, width, 5))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_figures_are_there(width):
    text = "\n".join(drawn(SNAPSHOT, width, 60))
    for figure in (
        "● training",
        "bfloat16",
        "layers 1 to 14 (14 of 16)",
        "adapter version 3",
        "tcp://10.0.0.5:7700",
        "tcp://10.0.0.5:7701",
        "2/5",
        "13/20 steps",
        "2/2 edges",
        "steps in all 1,033",
        "644 tokens/s",
        "2.0 edges/step",
        "3.4 sessions/decode",
        "queue 4",
        "streams 7",
        "1.0 GiB of 4.0 GiB",
        "3.0 MiB",
        "2.0 KiB/s",
        "5.0 GiB",
        "4.0 KiB/s",
        "silent 31 s",
        "12:00:39 line 39",
    ):
        assert figure in text


def test_the_table_shows_every_figure_of_an_edge_where_there_is_room():
    lines = drawn(SNAPSHOT, 120, 40)
    (edge,) = (line for line in lines if "clinic-north" in line)
    assert " ".join(edge.strip("│ ").split()) == "clinic-north 2:1 training 612 11 ms 2.314 0.025 0.41 0"
    (quiet,) = (line for line in lines if "東京病院" in line)
    assert " ".join(quiet.strip("│ ").split()) == "東京病院 1:1 generating 31.2 82 ms - 0.050 1.25 3"


def test_a_standard_terminal_shows_what_matters_most_of_an_edge():
    lines = drawn(SNAPSHOT, 80, 23)
    (edge,) = (line for line in lines if "clinic-north" in line)
    assert " ".join(edge.strip("│ ").split()) == "clinic-north 2:1 training 612 11 ms 2.314 0.41"
    assert len(lines) == 23
    assert "line 39" in lines[-2]


def test_with_too_many_edges_those_in_trouble_and_the_log_stay():
    lines = drawn(many(50), 80, 23)
    text = "\n".join(lines)
    assert len(lines) == 23
    assert "edges 50" in text
    assert "ward-3" in text
    assert "more" in text
    assert "line 39" in lines[-2]


def test_an_edges_name_is_neither_markup_nor_an_escape_sequence():
    edge = dataclasses.replace(EDGES[0], name="[red]x\x1b[2J", partition="\x1b]0;", state="\x1b[1m")
    text = "\n".join(drawn(dataclasses.replace(SNAPSHOT, edges=(edge,)), 120, 40))
    assert "[red]x [2J" in text
    assert "\x1b" not in text


def test_replicas_have_their_lines_and_those_in_trouble_come_first():
    text = "\n".join(drawn(REPLICATED, 120, 40))
    assert "replicas 12" in text
    assert "and 5 more" in text
    (gone,) = (line for line in text.splitlines() if "replica 12" in line)
    assert " ".join(gone.strip("│ ").split()) == "replica 12 starting again 2 0 480 gpu-12, process 99"
    assert "replicas 12" not in "\n".join(drawn(REPLICATED, 80, 12))


def test_the_plain_line():
    assert VIEW.plain_line(SNAPSHOT) == (
        "round 2/5  step 13/20  cohort 2/2  644 tokens/s  KV 1.0 GiB  in 3.0 MiB  out 5.0 GiB"
    )
    assert VIEW.plain_line(FRESH).isascii()
    assert VIEW.progress(SNAPSHOT) != VIEW.progress(dataclasses.replace(SNAPSHOT, hub_step=1034))
    assert VIEW.progress(SNAPSHOT) == VIEW.progress(dataclasses.replace(SNAPSHOT, uptime_s=0))


def test_a_snapshot_survives_its_file(tmp_path):
    path = tmp_path / "hub.json"
    write_snapshot(path, REPLICATED)
    assert from_fields(read_snapshot(path)) == REPLICATED
