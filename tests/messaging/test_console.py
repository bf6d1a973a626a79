"""Figures as text, the bounded curve, the journal, and the runner on and off a terminal."""

import io
import json
import math
import re
import sys
import threading
import time
from dataclasses import dataclass

import pytest
from rich.console import Console
from rich.text import Text

from messaging.console import Curve, Journal, LiveView, View
from messaging.console.dump import read_snapshot, write_snapshot
from messaging.console.figures import (
    byte_rate,
    duration,
    human_bytes,
    loss_text,
    milliseconds,
    number,
    of_total,
    printable,
    shares,
    sparkline,
    split_cells,
)

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


@pytest.mark.parametrize(
    ("figure", "value", "text"),
    [
        (number, None, "-"),
        (number, math.nan, "-"),
        (number, math.inf, "inf"),
        (number, 0, "0.00"),
        (number, 0.00001, "1.0e-05"),
        (number, 0.0251, "0.025"),
        (number, 4.25, "4.25"),
        (number, 9.999, "10.0"),
        (number, 99.96, "100"),
        (number, 1234.5, "1,234"),
        (loss_text, None, "-"),
        (loss_text, 2.3104, "2.310"),
        (loss_text, math.nan, "nan"),
        (human_bytes, None, "-"),
        (human_bytes, 0, "0 B"),
        (human_bytes, 1023, "1023 B"),
        (human_bytes, 1024, "1.0 KiB"),
        (human_bytes, 123 * 1024, "123 KiB"),
        (human_bytes, 1024**2 - 1, "1.0 MiB"),
        (human_bytes, 5 * 1024**3 // 4, "1.2 GiB"),
        (human_bytes, 4 * 1024**6, "4096 PiB"),
        (byte_rate, 3.2e6, "3.1 MiB/s"),
        (milliseconds, 0.42, "0.4 ms"),
        (milliseconds, 9.96, "10 ms"),
        (milliseconds, 999.6, "1.0 s"),
        (milliseconds, None, "-"),
        (duration, 0, "0 s"),
        (duration, 59.6, "1 min 00 s"),
        (duration, 185, "3 min 05 s"),
        (duration, 7980, "2 h 13 min"),
        (duration, 100 * 3600, "4 d 4 h"),
        (duration, math.inf, "-"),
    ],
)
def test_figures(figure, value, text):
    assert figure(value) == text


def test_progress_with_and_without_a_total():
    assert of_total(1300, 20000) == "1,300/20,000"
    assert of_total(13, None) == "13"


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([1.0], 8, "▅"),
        ([3.0, 3.0, 3.0], 8, "▅▅▅"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 7, 0, 0], 2, "█▁"),  # pairs are averaged
        ([0, 1, math.nan, math.inf], 8, "▁█××"),
        ([math.nan], 8, "×"),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_sparkline(values, width, line):
    assert sparkline(values, width) == line


def test_sparkline_is_never_wider_than_asked():
    assert all(len(sparkline(range(count), 50)) == min(count, 50) for count in range(300))


def test_shares_and_cells_fill_the_bar_exactly():
    assert shares([1, 3, -5]) == [0.25, 0.75, 0.0]
    assert shares([0, 0]) == [0.0, 0.0]
    assert split_cells([0.25, 0.75, 0.0], 10) == [3, 7, 0] or split_cells([0.25, 0.75, 0.0], 10) == [2, 8, 0]
    assert split_cells([0.0, 0.0], 10) == [0, 0]
    assert sum(split_cells(shares([1, 1, 1, 1, 1, 1, 1]), 66)) == 66


def test_printable_lets_no_escape_sequence_and_no_line_break_through():
    assert printable("a\x1b[2Jb\nc\u202e") == "a [2Jb c "
    assert printable("東京 Müller") == "東京 Müller"


def test_a_curve_stays_small_and_keeps_its_mean():
    curve = Curve(capacity=8)
    for value in range(64):
        curve.add(float(value))
    points = curve.points()
    assert len(points) <= 8
    assert points == tuple(sorted(points))
    assert sum(points) / len(points) == pytest.approx(31.5)


@pytest.mark.parametrize("capacity", [0, 1, 7])
def test_a_curve_refuses_an_odd_capacity(capacity):
    with pytest.raises(ValueError, match="capacity"):
        Curve(capacity)


def test_journal_stamps_keeps_the_last_lines_and_echoes_those_that_waited():
    journal, echoed = Journal(clock=lambda: 0.0, keep=2), []
    for message in ("one", "two\nlines", "three"):
        journal.log(message)
    assert [line[8:] for line in journal.recent()] == [" two lines", " three"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d three", journal.recent()[-1])
    journal.echo_to(echoed.append)
    journal.log("four")
    assert [line[9:] for line in echoed] == ["two lines", "three", "four"]


@dataclass(frozen=True)
class Count:
    step: int
    rate: float = math.nan


VIEW = View(
    render=lambda count, width, height: Text(f"step {count.step} in {width}x{height}"),
    plain_line=lambda count: f"step {count.step}",
    progress=lambda count: count.step,
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Pipe(io.StringIO):
    encoding = "utf-8"


class OldTerminal(Terminal):
    encoding = "ascii"


def terminal_console(file):
    return Console(file=file, force_terminal=True, width=80, height=24, _environ={"TERM": "xterm-256color"})


def view_threads():
    return [thread for thread in threading.enumerate() if thread.name == "live-view"]


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within 10 s"
        time.sleep(0.005)


def test_on_a_terminal_it_draws_in_place_and_leaves_the_last_state():
    file, steps, stdout = Terminal(), [0], sys.stdout
    with LiveView(lambda: Count(steps[0]), VIEW, Journal(), console=terminal_console(file), period_s=0.01):
        steps[0] = 1
        wait_for(lambda: "step 1 in 80x23" in file.getvalue())
        print("a line of somebody else's")
        steps[0] = 7
    text = file.getvalue()
    assert HIDE_CURSOR in text
    assert "a line of somebody else's" in text
    assert text.rindex("step 7") > text.rindex("step 1")
    assert text.rindex(SHOW_CURSOR) > text.rindex("step 7")
    assert sys.stdout is stdout
    assert not view_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_restores_the_terminal_and_stops_the_thread(error):
    file, stdout = Terminal(), sys.stdout
    with pytest.raises(error), LiveView(lambda: Count(1), VIEW, Journal(), console=terminal_console(file)):
        raise error
    assert file.getvalue().rindex(SHOW_CURSOR) > file.getvalue().rindex(HIDE_CURSOR)
    assert sys.stdout is stdout
    assert not view_threads()


def test_what_is_logged_after_the_view_is_printed():
    file, journal = Terminal(), Journal()
    with LiveView(lambda: Count(1), VIEW, journal, console=terminal_console(file)) as view:
        view.log("shown by the view itself")
        assert "shown by" not in file.getvalue()
    journal.log("saved to state/")
    assert file.getvalue().endswith(" saved to state/\n")


def test_a_failing_snapshot_is_said_once_and_does_not_end_the_work():
    file = Pipe()
    with LiveView(lambda: Count(1 // 0), VIEW, Journal(), console=Console(file=file), period_s=0.01):
        time.sleep(0.05)
    assert file.getvalue().count("ZeroDivisionError") == 1


def test_a_failing_view_ends_itself_and_not_the_work(tmp_path):
    file, journal, steps = Terminal(), Journal(), [0]
    view = View(lambda count, width, height: Text(f"{1 // (1 - count.step)}"), VIEW.plain_line, VIEW.progress)
    status = tmp_path / "status.json"
    with LiveView(lambda: Count(steps[0]), view, journal, console=terminal_console(file), period_s=0.01, dump=status):
        steps[0] = 1
        wait_for(lambda: "live view stopped" in file.getvalue())
        journal.log("still at work")
        steps[0] = 5
    assert file.getvalue().endswith(" still at work\n")
    assert file.getvalue().count("ZeroDivisionError") == 1
    assert read_snapshot(status)["step"] == 5
    assert file.getvalue().rindex(SHOW_CURSOR) > file.getvalue().rindex(HIDE_CURSOR)
    assert not view_threads()


def test_a_new_terminal_size_starts_on_an_empty_screen():
    file = Terminal()
    console = terminal_console(file)
    with LiveView(lambda: Count(1), VIEW, Journal(), console=console, period_s=0.01):
        assert "\x1b[2J" not in file.getvalue()
        console.size = (60, 20)
        wait_for(lambda: "in 60x19" in file.getvalue())
    assert file.getvalue().count("\x1b[2J") == 1


@pytest.mark.parametrize(
    ("kind", "headless"),
    [(Pipe, False), (Terminal, True), (OldTerminal, False)],
    ids=["not a terminal", "headless", "a terminal without the characters"],
)
def test_plain_lines_elsewhere(kind, headless):
    file, steps, journal = kind(), [0], Journal()
    journal.log("before")
    # FORCE_COLOR has the effect of force_terminal: a pipe is a pipe all the same.
    view = LiveView(
        lambda: Count(steps[0]), VIEW, journal, console=terminal_console(file), headless=headless, period_s=0.01
    )
    with view:
        view.log("Größe")
        steps[0] = 1
        wait_for(lambda: "step 1" in file.getvalue())
        steps[0] = 2
        time.sleep(0.05)
        assert "step 2" not in file.getvalue()  # not so soon
    text = "Gr\\xf6\\xdfe" if file.encoding == "ascii" else "Größe"
    assert re.fullmatch(
        "".join(rf"\d\d:\d\d:\d\d {re.escape(line)}\n" for line in ("before", text, "step 1", "step 2")),
        file.getvalue(),
    )
    assert not view_threads()


def test_a_closed_pipe_does_not_end_the_work():
    file, journal = Pipe(), Journal()
    with LiveView(lambda: Count(1), VIEW, journal, console=Console(file=file)):
        file.close()
        journal.log("nobody reads this")


def test_the_snapshot_is_written_whole_and_as_valid_json(tmp_path):
    path = tmp_path / "status.json"
    with LiveView(lambda: Count(3), VIEW, Journal(), console=Console(file=Pipe()), dump=path):
        assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 3, "rate": None}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_snapshot_that_cannot_be_written_is_said_once(tmp_path):
    file = Pipe()
    with LiveView(
        lambda: Count(1), VIEW, Journal(), console=Console(file=file), period_s=0.01, dump=tmp_path / "no" / "x.json"
    ):
        time.sleep(0.05)
    assert file.getvalue().count("no status can be written") == 1


def test_reading_something_else_than_a_snapshot_is_an_error(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds no snapshot"):
        read_snapshot(path)
    write_snapshot(path, Count(1, 2.0))
    assert read_snapshot(path) == {"step": 1, "rate": 2.0}
