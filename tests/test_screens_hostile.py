"""Whatever the other side of the wire says, no escape sequence of it reaches a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from edge.monitor import VIEW as EDGE_VIEW
from edge.monitor import EdgeSnapshot
from hub.admin import show_audit
from hub.monitor import VIEW as HUB_VIEW
from hub.monitor import EdgeRow, HubSnapshot
from hub.store.access import clean_name
from messaging.commands import exit_codes
from messaging.console import Journal
from messaging.errors import ErrorCode, HubError, InputError

ESCAPES = st.sampled_from(
    ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\r", "\n", "\x08", "\u202e", "\u2028", "\x7f", "[red]"]
)
HOSTILE = st.lists(ESCAPES | st.text(max_size=8), max_size=5).map("".join)
hostile = given(HOSTILE)
bounded = settings(max_examples=150, deadline=None)


def harmless(shown: str) -> None:
    assert all(character.isprintable() for line in shown.split("\n") for character in line), ascii(shown)


def drawn(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False, soft_wrap=True)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@hostile
@example("\x1b[2J")
@bounded
def test_the_hubs_screen(text: str) -> None:
    edges = (EdgeRow(text, text, text, 1.0), EdgeRow("a", "1:1", text, silent_s=100.0))
    snapshot = HubSnapshot(text, text, text, endpoints=(text,), edges=edges, log=(f"12:00:00 {text}",))
    for size in ((100, 40), (40, 12)):
        harmless(drawn(HUB_VIEW.render(snapshot, *size)))
    harmless(HUB_VIEW.plain_line(snapshot))


@hostile
@bounded
def test_the_edges_screen(text: str) -> None:
    snapshot = EdgeSnapshot(text, text, text, model=text, partition=text, log=(f"12:00:00 {text}",), trouble=text)
    for size in ((100, 40), (40, 12)):
        harmless(drawn(EDGE_VIEW.render(snapshot, *size)))
    harmless(Journal().stamp(EDGE_VIEW.plain_line(snapshot)))


@hostile
@bounded
def test_lines_of_the_log(text: str) -> None:
    journal = Journal()
    lines: list[str] = []
    journal.echo_to(lines.append)
    journal.log(text)
    (line,) = lines
    harmless(line)
    assert "\n" not in line


@hostile
@bounded
def test_names_of_edges(text: str) -> None:
    name = clean_name(text)
    harmless(name)
    assert name == clean_name(name)
    assert "\n" not in name
    assert "[" not in name


@hostile
@bounded
def test_lines_of_the_audit_log(text: str) -> None:
    console = Console(file=io.StringIO(), width=100)
    show_audit({"events": [{"time": "now", "event": text, "name": text, "reason": text, "key": text}]}, console)
    assert isinstance(console.file, io.StringIO)
    harmless(console.file.getvalue())


def errors() -> Iterator[Exception]:
    for text in ("\x1b]0;owned\x07", "two\nlines \x1b[2J", "\x9b31m\r"):
        yield HubError(ErrorCode.PROTOCOL, text)
        yield InputError(text)


@pytest.mark.parametrize("error", list(errors()), ids=repr)
def test_errors_of_a_command(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_codes():
        raise error
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    harmless(shown)
