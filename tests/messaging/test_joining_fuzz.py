"""Join strings: any text at all, and files with anything in them."""

from __future__ import annotations

import base64
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from messaging.errors import InputError
from messaging.joining import HubAddress, JoinString, read_join
from messaging.transport import Channel

PORTS = st.integers(1, 65535)
HOSTS = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,40})", fullmatch=True) | st.ip_addresses(v=6).map(str)
ADDRESSES = st.builds(
    HubAddress,
    HOSTS,
    PORTS,
    PORTS,
    PORTS,
    st.binary(min_size=32, max_size=32).map(lambda key: z85.encode(key).decode()),
)
JOINS = st.builds(JoinString, ADDRESSES, st.binary(max_size=64))
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


def parses_or_refuses(text: str) -> None:
    try:
        joined = JoinString.parse(text)
    except InputError:
        return
    assert JoinString.parse(joined.encode()) == joined
    assert all(joined.hub.endpoint(channel).startswith("tcp://") for channel in Channel)


@given(JOINS)
@settings(max_examples=200, deadline=None)
def test_round_trip(join: JoinString) -> None:
    assert JoinString.parse(join.encode()) == join
    assert JoinString.parse(f"  {join.encode()}\n") == join


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text(text: str) -> None:
    parses_or_refuses(text)
    parses_or_refuses("fedsea1:" + text)


@given(st.binary(max_size=800) | ANYTHING.map(msgpack.packb))
@settings(max_examples=250, deadline=None)
def test_any_bytes_inside(packed: bytes) -> None:
    parses_or_refuses("fedsea1:" + base64.urlsafe_b64encode(packed).decode().rstrip("="))


@given(JOINS, st.integers(0, 3), ANYTHING)
@settings(max_examples=300, deadline=None)
def test_a_field_replaced_by_anything(join: JoinString, place: int, value: object) -> None:
    text = join.encode().removeprefix("fedsea1:")
    fields = msgpack.unpackb(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    fields[place] = value
    parses_or_refuses("fedsea1:" + base64.urlsafe_b64encode(msgpack.packb(fields)).decode().rstrip("="))


@given(JOINS, st.data())
@settings(max_examples=300, deadline=None)
def test_a_character_wrong(join: JoinString, data: st.DataObject) -> None:
    text = join.encode()
    at = data.draw(st.integers(0, len(text) - 1))
    parses_or_refuses(text[:at] + data.draw(st.characters()) + text[at + 1 :])
    parses_or_refuses(text[:at])


@given(st.text().filter(lambda name: not name.startswith(("/", "~"))))
@settings(max_examples=200, deadline=None)
def test_any_file_name(name: str) -> None:
    with pytest.raises(InputError):
        read_join(f"@no such folder/{name}")


@pytest.mark.parametrize("name", ["~no-such-user/join", "a\0b", "/dev/zero", "/dev/full", "."])
def test_names_that_are_no_files_with_a_join_string(name: str) -> None:
    with pytest.raises(InputError):
        read_join("@" + name)


@given(st.binary(max_size=2000))
@settings(max_examples=100, deadline=None)
def test_any_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "join"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_join(f"@{path}")
