"""The pieces that the views are put together from: a frame, labelled rows that wrap, a table, bars.

Everything is laid out by hand into one `Text`: several times cheaper than rich's tables and panels, and
this is drawn twice a second beside the work. Every text is cleaned here and none is parsed: nobody's name is
read as markup or as an escape sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from messaging.console.figures import printable

#: A frame wider than this only spreads its figures out.
MAX_WIDTH = 120
#: Columns of a row's label, of the gap between pieces, and of the frame's border on both sides.
LABEL = 10
_GAP = 3
_BORDER = 4
#: Pieces start at multiples of this, so that they stand below each other and do not jump with every digit.
_TAB = 4

GOOD, WAIT, BAD, DIM, STRONG = "green", "yellow", "red", "dim", "bold"
ACCENT = "cyan"
_GOOD_WORDS = {"training", "serving", "generating", "evaluating", "done", "saved"}
_BAD_WORDS = {"lost", "refused", "failed", "silent", "gone", "stopped", "revoked"}


@dataclass(frozen=True)
class Column:
    """A table's column: its head, its width, and whether it holds words (left) or figures (right)."""

    head: str
    width: int
    words: bool = False


def inner_width(width: int) -> int:
    """Columns between the frame's borders on a terminal that is `width` wide."""
    return max(16, min(width, MAX_WIDTH) - _BORDER)


def phase_style(phase: str) -> str:
    """Green for a phase that gets on, red for one that needs somebody, yellow for waiting; by its first word."""
    word = phase.split(" ", 1)[0].lower()
    return GOOD if word in _GOOD_WORDS else BAD if word in _BAD_WORDS else WAIT


def clean(text: Text) -> Text:
    """The text without control characters, in the same colours."""
    if not text.plain.isprintable():
        text = text.copy()
        text.plain = printable(text.plain)
    return text


def piece(label: str, value: str, style: str = "") -> Text:
    """A figure with its name before it in grey."""
    return Text.assemble((f"{label} ", DIM), (value, style))


def row(label: str, pieces: Sequence[Text], width: int, tab: int = _TAB) -> list[Text]:
    """The pieces after a label, on as many lines as they need."""
    # Appended, not Text(label, DIM): that would make the whole line grey.
    lines = [Text().append(label.ljust(LABEL), DIM)]
    for at, item in enumerate(map(clean, pieces)):
        line = lines[-1]
        used = line.cell_len
        start = used if used <= LABEL else LABEL + -(-(used + _GAP - LABEL) // tab) * tab
        if at and start + item.cell_len > width:
            lines.append(Text(" " * LABEL))
            line, used, start = lines[-1], LABEL, LABEL
        line.append(" " * (start - used)).append_text(item)
    return lines


def progress_bar(done: float, total: float, width: int, style: str = ACCENT) -> Text:
    """A thick line as long as what is done, on a thin one as long as the whole."""
    halves = round(2 * width * min(1.0, max(0.0, done / total))) if total > 0 else 0
    full = "━" * (halves // 2) + "╸" * (halves % 2)
    return Text.assemble((full, style), ("─" * (width - len(full)), "bright_black"))


def table(columns: Sequence[Column], rows: Sequence[Sequence[Text]]) -> list[Text]:
    """A head and one line for each row, every cell cut or padded to its column."""
    lines = [_table_line(columns, [Text(column.head, DIM) for column in columns])]
    return lines + [_table_line(columns, cells) for cells in rows]


def _table_line(columns: Sequence[Column], cells: Sequence[Text]) -> Text:
    line = Text()
    for at, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        line.append(" " * (2 if at else 0))
        cut = fit(clean(cell), column.width)
        blank = " " * (column.width - cut.cell_len)
        if not column.words:
            line.append(blank)
        line.append_text(cut)
        if column.words:
            line.append(blank)
    return line


def fit(text: Text, width: int) -> Text:
    """The text, cut with an ellipsis where it is wider than `width`."""
    if text.cell_len <= width:
        return text
    cut = text.copy()
    cut.truncate(width, overflow="ellipsis")
    return cut


def log_lines(log: Sequence[str], count: int) -> list[Text]:
    """The last lines of the log, the time in grey."""
    lines = []
    for entry in log[-count:] if count > 0 else []:
        time, _, message = entry.partition(" ")
        lines.append(clean(Text.assemble((time, DIM), " ", message)))
    return lines


@dataclass(frozen=True)
class Section:
    """Lines of a frame, after a divider with a title; the first section has none."""

    lines: Sequence[Text]
    title: str = ""


def frame(title: Text, status: Text, sections: Sequence[Section], width: int) -> Text:
    """A box: what this is at the top left, how it is at the top right, then the sections."""
    inner = inner_width(width)
    status = fit(clean(status), inner // 2)
    title = fit(clean(title), inner - status.cell_len - 2)
    fill = inner - title.cell_len - status.cell_len - 2
    box = Text(no_wrap=True, overflow="crop", end="")
    box.append("╭ ", DIM).append_text(title).append(f" {'─' * fill} ", DIM).append_text(status).append(" ╮\n", DIM)
    for at, section in enumerate(sections):
        if at:
            head = f" {section.title} " if section.title else ""
            box.append(f"├─{head}{'─' * (inner + 1 - cell_len(head))}┤\n", DIM)
        for line in section.lines:
            cut = fit(line, inner)
            box.append("│ ", DIM).append_text(cut).append(" " * (inner - cut.cell_len)).append(" │\n", DIM)
    return box.append(f"╰{'─' * (inner + 2)}╯", DIM)


def rows_left(height: int, sections: Sequence[Section]) -> int:
    """Lines still free in a frame of `height` lines once these sections stand and one more divider."""
    taken = sum(len(section.lines) for section in sections)
    return height - 2 - taken - len(sections)
