"""The profile: what every moment is charged to, and that both commands can be timed from outside."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

from tools.bench.models import Models
from tools.profile.picture import WIDTH, draw, svg
from tools.profile.run import Profile, measure
from tools.profile.spans import WAITING, Recorder, Span, labelled, read
from tools.profile.sweep import Lane, Piece, charge, innermost, undisturbed


def span(label: str, begin: int, end: int) -> Span:
    return Span(label, "thread", begin, end)


def lane(arrival: str, *spans: Span) -> Lane:
    return Lane(innermost(spans), arrival)


def test_nested_calls_are_charged_to_the_innermost() -> None:
    spans = [span("inner", 2, 4), span("innermost", 3, 4), span("outer", 1, 9), span("next", 9, 10)]
    assert innermost(spans) == [
        Piece("outer", 1, 2),
        Piece("inner", 2, 3),
        Piece("innermost", 3, 4),
        Piece("outer", 4, 9),
        Piece("next", 9, 10),
    ]


def test_what_waits_is_charged_to_what_runs_meanwhile() -> None:
    edge = lane("waking the edge", span("model", 0, 100), span(WAITING, 10, 90))
    hub = lane("on its way", span("loop", 20, 80), span("decode", 30, 40))
    assert charge([edge, hub], 0, 100) == {
        "model": 20, "on its way": 10, "loop": 50, "decode": 10, "waking the edge": 10,
    }  # fmt: skip


def test_the_foremost_lane_is_charged_where_two_run() -> None:
    first, second = lane("a", span("compute", 10, 20)), lane("b", span("loop", 0, 30))
    assert charge([first, second], 0, 30) == {"loop": 20, "compute": 10}


def test_a_window_is_charged_whole() -> None:
    edge = lane("arrival", span("before", 0, 15), span("inside", 20, 30), span("after", 35, 90))
    charged = charge([edge], 10, 40)
    assert charged == {"before": 5, "inside": 10, "after": 5, "arrival": 10}
    assert charge([edge], 95, 99) == {"arrival": 4}


def test_windows_that_something_disturbed_are_left_out() -> None:
    windows = [{"a": 7_000_000 + n, "b": n % 2 * 2_000_000} for n in range(7)] + [{"a": 1_000_000_000}]
    assert undisturbed(windows) == pytest.approx({"a": 7.0, "b": 0.0}, abs=1e-5)
    assert undisturbed([{"a": 2_000_000}]) == {"a": 2.0}


def test_calls_are_written_down_with_their_threads(tmp_path: Path) -> None:
    class Work:
        def step(self, number: int) -> int:
            return number + 1

    record = Recorder()
    record.wrap(Work, "step", "step")
    assert Work().step(1) == 2
    thread = threading.Thread(target=Work().step, args=(1,), name="other")
    thread.start()
    thread.join()
    with pytest.raises(TypeError):
        Work().step("one")  # type: ignore[arg-type]
    record.write(tmp_path / "spans.json")
    found = labelled(read(tmp_path / "spans.json"), "step")
    assert [span.thread for span in found] == ["MainThread", "other", "MainThread"]
    assert all(span.end >= span.begin for span in found)


def test_the_picture_shows_every_part_and_asks_nothing_of_the_network() -> None:
    parts = {"edge: head": 3.0, "link: socket": 1.0, "hub: Blocks B": 12.0, "hub: tiny": 0.001}
    view = draw(Profile(parts, parts))
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(view)
    assert "one decoded token, 16.0 ms" in text.getvalue()
    assert "edge 3.0 ms, 19%" in text.getvalue()
    assert "hub: Blocks B" in text.getvalue()
    assert "hub: tiny" not in text.getvalue()
    drawn = svg(view)
    assert drawn.startswith("<svg")
    assert "url(" not in drawn.replace("url(#", "")


@pytest.mark.slow
def test_a_hub_and_an_edge_are_profiled(tmp_path: Path) -> None:
    profile = measure(tmp_path, Models(tmp_path / "models").small, tokens=16, steps=4)
    for parts, wanted in (
        (profile.token, ("edge: Blocks A", "edge: Blocks C", "edge: head", "edge: noise", "hub: Blocks B")),
        (profile.step, ("edge: backward of Blocks C and A", "hub: Blocks B backward", "hub: optimizer")),
    ):
        assert set(wanted) <= parts.keys()
        assert all(ms > 0 for ms in parts.values())
        assert {label.partition(":")[0] for label in parts} == {"edge", "link", "hub"}
