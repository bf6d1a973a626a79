"""Files become records, and bad files an error that names the place and what to do."""

import csv
import json
from pathlib import Path

import pytest

from edge.data import DataError
from edge.data.records import ChatRecord, PairRecord, TextRecord, read_records
from messaging.errors import InputError


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def test_jsonl_reads_each_kind_of_record_with_its_line(write):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "name": "bo"}]
    lines = [
        json.dumps({"text": "a b", "id": 1}),
        "",
        json.dumps({"prompt": "p", "completion": "c"}) + "\r",
        json.dumps({"messages": messages}),
    ]
    text, pair, chat = read_records(write("a.jsonl", "\n".join(lines) + "\n"))
    assert isinstance(text, TextRecord)
    assert isinstance(pair, PairRecord)
    assert isinstance(chat, ChatRecord)
    assert (text.text, text.whole_file, text.origin.line) == ("a b", False, 1)
    assert (pair.prompt, pair.completion, pair.origin.line) == ("p", "c", 3)
    assert (chat.messages, chat.origin.line) == (messages, 4)


def test_line_separator_inside_a_json_string_does_not_end_the_line(write):
    (record,) = read_records(write("a.jsonl", '{"text": "a\u2028b"}\n'))
    assert record.text == "a\u2028b"


def test_txt_is_one_record_with_unix_line_ends_and_no_byte_order_mark(write):
    (record,) = read_records(write("a.TXT", b"\xef\xbb\xbfone\r\ntwo\n"))
    assert (record.text, record.whole_file) == ("one\ntwo\n", True)


def test_csv_reads_text_or_pairs_and_counts_lines_inside_quotes(write):
    pairs = read_records(write("a.csv", 'id,prompt, completion\n1,"two\nlines",x\n\n2,"a, b",""\n'))
    assert [(r.prompt, r.completion, r.origin.line) for r in pairs] == [("two\nlines", "x", 2), ("a, b", "", 5)]
    (record,) = read_records(write("b.csv", "text\r\nhello\r\n"))
    assert record.text == "hello"


def test_csv_field_of_any_length_and_the_process_keeps_its_limit(write):
    limit = csv.field_size_limit()
    (record,) = read_records(write("a.csv", "text\n" + "a" * 200_000 + "\n"))
    assert len(record.text) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.jsonl", "", None, "empty"),
        ("a.txt", " \n\n", None, "empty"),
        ("a.csv", "text\n", None, "empty"),
        ("a.parquet", "x", None, "use one of .csv, .jsonl, .txt"),
        ("noend", "x", None, "no suffix"),
        ("a.txt", b"ok\nok\n\xff\n", 3, "UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\nnot json\n', 3, "is not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', 2, "is not JSON"),
        ("a.jsonl", "[" * 100_000, 1, "is not JSON"),
        ("a.jsonl", "1" * 5000, 1, "is not JSON"),
        ("a.jsonl", '["text"]', 1, "not an object"),
        ("a.jsonl", '{"txt": "a"}', 1, "has `txt`, but needs `text`, or `prompt` and `completion`, or `messages`"),
        ("a.jsonl", '{"prompt": "a"}', 1, "`prompt` and `completion`"),
        ("a.jsonl", '{"text": "a", "messages": []}', 1, "keep only one"),
        ("a.jsonl", '{"text": null}', 1, "`text` is of type NoneType"),
        ("a.jsonl", '{"prompt": "a", "completion": 3}', 1, "`completion` is of type int"),
        ("a.jsonl", '{"text": "\\ud800"}', 1, "surrogate"),
        ("a.jsonl", '{"messages": "hi"}', 1, "must be a list"),
        ("a.jsonl", '{"messages": ["hi"]}', 1, "`messages[0]` must be an object"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', 1, "`messages[0].content`"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', 1, "nothing to learn"),
        ("a.csv", "name;text\na;b\n", 1, "has `name;text`, but needs `text`"),
        ("a.csv", "messages\n[]\n", 1, "but needs `text`, or `prompt` and `completion`;"),
        ("a.csv", "id,text\n1,a\n2,b, c\n", 3, "quote fields that hold a comma"),
        ("a.csv", 'text\nok\n"open\n\n', 3, "is not CSV"),
    ],
)
def test_bad_input_names_file_and_line_and_what_to_do(write, name, content, line, says):
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read_records(path)
    place = f"{path}: " if line is None else f"{path}:{line}: "
    assert str(caught.value).startswith(place)
    assert says in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "folder.txt")


def test_data_error_is_bad_input_with_exit_code_2():
    assert issubclass(DataError, ValueError)
    assert issubclass(DataError, InputError)
    assert DataError.exit_code == 2
