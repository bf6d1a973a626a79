"""Readers: a `.jsonl`, `.csv` or `.txt` file becomes a list of records, each with the place that it came from."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.data.errors import Origin


@dataclass(frozen=True)
class TextRecord:
    """Plain text; every token is a target. `whole_file`: the text is a `.txt` file, not one record of many."""

    origin: Origin
    text: str
    whole_file: bool = False


@dataclass(frozen=True)
class PairRecord:
    """A prompt and its completion; only the completion is a target."""

    origin: Origin
    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRecord:
    """A conversation. Every message has `role` and `content` as text; the chat template sees its other keys too."""

    origin: Origin
    messages: list[dict[str, Any]]


Record = TextRecord | PairRecord | ChatRecord

#: The sets of keys that make a record.
_TEXT, _PAIR, _CHAT = ("text",), ("prompt", "completion"), ("messages",)


def read_records(path: Path) -> list[Record]:
    """All records of one file, in order.

    Raises DataError for a file that is missing, unreadable, empty, not UTF-8 or of an unknown kind, and for a
    record that is malformed, with its line.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise Origin(path).error(f"files of kind {path.suffix or '(no suffix)'!r} are unknown; use one of {known}")
    text = _read_text(path)
    records = list(reader(path, text)) if text.strip() else []
    if not records:
        raise Origin(path).error("the file is empty; give a file with at least one record")
    return records


def _read_text(path: Path) -> str:
    """The file's text without a byte order mark."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise Origin(path).error("no such file; check the path") from None
    except OSError as error:
        raise Origin(path).error(f"cannot be read ({error.strerror}); give a readable file") from error
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Origin(path, line).error("is not UTF-8; save the file as UTF-8") from error


def _read_txt(path: Path, text: str) -> Iterator[Record]:
    yield TextRecord(Origin(path, 1), text.replace("\r\n", "\n"), whole_file=True)


def _read_jsonl(path: Path, text: str) -> Iterator[Record]:
    # Not splitlines(): U+2028 and its kin may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        origin = Origin(path, number)
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise origin.error(f"is not JSON ({error}); every line must be one JSON object") from error
        if not isinstance(fields, dict):
            raise origin.error(f"is JSON but not an object; write {{...}} instead of {type(fields).__name__}")
        yield _record(fields, _shape(fields, (_TEXT, _PAIR, _CHAT), origin), origin)


def _read_csv(path: Path, text: str) -> Iterator[Record]:
    rows = _csv_rows(path, text)
    _, header = rows[0]
    columns = [name.strip() for name in header]
    shape = _shape(columns, (_TEXT, _PAIR), Origin(path, 1))
    for line, row in rows[1:]:
        origin = Origin(path, line)
        if len(row) != len(columns):
            raise origin.error(
                f"has {len(row)} fields where the header has {len(columns)}; quote fields that hold a comma"
            )
        yield _record(dict(zip(columns, row, strict=True)), shape, origin)


def _csv_rows(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line it starts on."""
    # The csv module refuses fields over 128 KiB unless told otherwise, and keeps that limit for the whole process.
    old_limit = csv.field_size_limit()
    csv.field_size_limit(max(old_limit, len(text)))
    rows = []
    line = 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise Origin(path, line).error(f"is not CSV ({error}); check the quotes of this row") from error
    finally:
        csv.field_size_limit(old_limit)
    return rows


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
}


def _shape(keys: Collection[str], shapes: tuple[tuple[str, ...], ...], origin: Origin) -> tuple[str, ...]:
    """The one of `shapes` whose keys are all there; DataError when there is none or more than one."""
    found = [shape for shape in shapes if all(key in keys for key in shape)]
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(f"`{key}`" for shape in found for key in shape)
        raise origin.error(f"has {both}, so what to learn is not clear; keep only one kind")
    wanted = ", or ".join(" and ".join(f"`{key}`" for key in shape) for shape in shapes)
    there = ", ".join(f"`{key}`" for key in keys) or "nothing"
    raise origin.error(f"has {there}, but needs {wanted}; rename the fields")


def _record(fields: dict[str, Any], shape: tuple[str, ...], origin: Origin) -> Record:
    if shape == _TEXT:
        return TextRecord(origin, _text(fields["text"], "text", origin))
    if shape == _PAIR:
        prompt = _text(fields["prompt"], "prompt", origin)
        return PairRecord(origin, prompt, _text(fields["completion"], "completion", origin))
    return ChatRecord(origin, _messages(fields["messages"], origin))


def _text(value: object, name: str, origin: Origin) -> str:
    """`value` if it is text that can be encoded; DataError otherwise."""
    if not isinstance(value, str):
        raise origin.error(f"`{name}` is of type {type(value).__name__}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise origin.error(f"`{name}` holds half of a surrogate pair; write whole characters") from None
    return value


def _messages(value: object, origin: Origin) -> list[dict[str, Any]]:
    """`value` if it is a conversation with something to learn; DataError otherwise."""
    if not isinstance(value, list):
        raise origin.error(f"`messages` is of type {type(value).__name__}; it must be a list of messages")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise origin.error(f"`messages[{number}]` must be an object with `role` and `content`")
        for key in ("role", "content"):
            _text(message.get(key), f"messages[{number}].{key}", origin)
    if not any(message["role"] == "assistant" for message in value):
        raise origin.error("no message has the role `assistant`, so there is nothing to learn; leave the record out")
    return value
