"""The edge's screen at several sizes, and as one line."""

import dataclasses
import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from edge.monitor import VIEW, EdgeSnapshot, TimeSpent
from edge.monitor.snapshot import from_fields
from messaging.console.dump import read_snapshot, write_snapshot

SNAPSHOT = EdgeSnapshot(
    name="clinic-north",
    hub="tcp://10.0.0.5:7700",
    phase="training",
    model="Llama-3.2-1B",
    partition="2:1",
    wire="int8",
    cohort_joined=2,
    cohort_size=3,
    step=33,
    steps=100,
    round=2,
    rounds=5,
    round_step=13,
    round_steps=20,
    eta_s=130,
    loss=2.31,
    losses=(4.812, 4.1, 3.3, 2.5, 2.31),
    held_out_before=4.702,
    held_out_last=3.201,
    tokens_per_s=1234.4,
    round_trip_ms=12.3,
    time_spent=TimeSpent(blocks_a=2, link=1, hub=3, blocks_c=3, other=1),
    bytes_sent=3 << 20,
    bytes_received=5 << 30,
    noise_scale=0.02,
    noise_sigma=0.02507,
    noise_r=0.41,
    log=tuple(f"12:00:{second:02d} line {second}" for second in range(40)),
)
FRESH = EdgeSnapshot(name="clinic-north", hub="tcp://10.0.0.5:7700", phase="waiting for the hub")


def drawn(snapshot: EdgeSnapshot, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(VIEW.render(snapshot, width, height))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("snapshot", [SNAPSHOT, FRESH], ids=["training", "fresh"])
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
        "tcp://10.0.0.5:7700",
        "Llama-3.2-1B",
        "partition 2:1",
        "wire int8",
        "cohort 2/3",
        "2/5",
        "13/20 steps",
        "33/100",
        "left 2 min 10 s",
        "4.812 █",
        "▁ 2.310",
        "before 4.702",
        "now 3.201",
        "-1.501",
        "1,234 tokens/s",
        "round trip 12 ms",
        "A 20%",
        "link 10%",
        "hub wait 30%",
        "C 30%",
        "other 10%",
        "sent 3.0 MiB",
        "received 5.0 GiB",
        "scale 0.020",
        "sigma 0.025",
        "r 0.41",
        "12:00:39 line 39",
    ):
        assert figure in text


def test_it_fits_a_standard_terminal_and_ends_with_the_newest_line():
    lines = drawn(SNAPSHOT, 80, 23)
    assert len(lines) == 23
    assert "line 39" in lines[-2]


def test_a_nan_loss_and_no_noise_are_said():
    text = "\n".join(drawn(dataclasses.replace(SNAPSHOT, loss=math.nan, losses=(2.0, math.nan), noise_scale=0), 80, 40))
    assert "█× nan" in text or "▅× nan" in text
    assert "noise     off" in text


def test_a_hubs_text_is_neither_markup_nor_an_escape_sequence():
    text = "\n".join(drawn(dataclasses.replace(SNAPSHOT, model="[red]x[/]\x1b[2J", phase="[/b]"), 80, 40))
    assert "[red]x[/] [2J" in text
    assert "\x1b" not in text


def test_the_plain_line():
    line = VIEW.plain_line(SNAPSHOT)
    assert line == (
        "round 2/5  step 33/100  loss 2.310  held-out 3.201  1,234 tokens/s  sent 3.0 MiB  received 5.0 GiB"
    )
    assert VIEW.plain_line(FRESH).isascii()
    assert VIEW.progress(SNAPSHOT) != VIEW.progress(dataclasses.replace(SNAPSHOT, step=34))
    assert VIEW.progress(SNAPSHOT) == VIEW.progress(dataclasses.replace(SNAPSHOT, bytes_sent=0))


def test_a_snapshot_survives_its_file(tmp_path):
    path = tmp_path / "edge.json"
    write_snapshot(path, SNAPSHOT)
    assert from_fields(read_snapshot(path)) == SNAPSHOT
    write_snapshot(path, dataclasses.replace(SNAPSHOT, losses=(1.0, math.nan)))
    assert math.isnan(from_fields(read_snapshot(path)).losses[1])


def test_names_are_grey_and_figures_are_not():
    view, console = VIEW.render(SNAPSHOT, 80, 23), Console(file=io.StringIO())
    at = view.plain.index("scale 0.020")
    assert view.get_style_at_offset(console, at).dim
    assert not view.get_style_at_offset(console, at + len("scale ")).dim


def test_what_is_wrong_with_the_hub_stands_in_the_place_of_the_phase():
    silent = dataclasses.replace(SNAPSHOT, trouble="hub silent for 16 s, retrying")
    text = "\n".join(drawn(silent, 80, 24))
    assert "● hub silent for 16 s, retrying" in text
    assert "● training" not in text
    view, console = VIEW.render(silent, 80, 23), Console(file=io.StringIO())
    assert view.get_style_at_offset(console, view.plain.index("hub silent")).color.name == "red"
