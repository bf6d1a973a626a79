"""The join string: back and forth, and clear words for everything that is none."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messaging.errors import InputError
from messaging.joining import HubAddress, JoinString, new_token, read_join, token_hash
from messaging.keys import new_keys
from messaging.transport import Channel

KEY = new_keys().public
HOSTS = ["hub.example.org", "10.0.0.7", "localhost", "fe80::1", "::1", "my_hub-2"]


def join(host: str = "hub.example.org") -> JoinString:
    return JoinString(HubAddress(host, 7000, 7001, 7002, KEY), b"0123456789abcdef")


def packed(*fields: object) -> str:
    return "fedsea1:" + base64.urlsafe_b64encode(msgpack.packb(fields)).decode().rstrip("=")


@pytest.mark.parametrize("host", HOSTS)
def test_round_trip(host: str) -> None:
    text = join(host).encode()
    assert JoinString.parse(f"  {text}\n") == join(host)
    assert len(text) < 160


def test_endpoints() -> None:
    assert join().hub.endpoint(Channel.BULK) == "tcp://hub.example.org:7001"
    assert join("::1").hub.endpoint(Channel.ENROL) == "tcp://[::1]:7002"


def test_the_token_is_not_shown() -> None:
    assert "0123456789abcdef" not in repr(join())
    assert len(new_token()) == 16
    assert new_token() != new_token()
    assert token_hash(b"x") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


RAW = bytes(32)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fedsea1:",
        "fedsea2:AAAA",
        "http://hub:7000",
        "fedsea1:!!!!",
        "fedsea1:AAAA",
        "fedsea1:A",
        "fedsea1:" + "A" * 2000,
        packed("h", [1, 2, 3], RAW),
        packed("h", [1, 2, 3], RAW, b"t", 5),
        packed("h", [1, 2], RAW, b"t"),
        packed("h", [0, 2, 3], RAW, b"t"),
        packed("h", [1, 2, 65536], RAW, b"t"),
        packed("h", [1, True, 3], RAW, b"t"),
        packed("h", [1, "2", 3], RAW, b"t"),
        packed("h", [1, 2, 3], RAW[1:], b"t"),
        packed("h", [1, 2, 3], "k" * 32, b"t"),
        packed("h", [1, 2, 3], RAW, b"t" * 65),
        packed("", [1, 2, 3], RAW, b"t"),
        packed("h h", [1, 2, 3], RAW, b"t"),
        packed("h:80/x", [1, 2, 3], RAW, b"t"),
        packed(b"h", [1, 2, 3], RAW, b"t"),
        packed({"h": 1}, [1, 2, 3], RAW, b"t"),
    ],
)
def test_what_is_no_join_string(text: str) -> None:
    with pytest.raises(InputError, match="join string"):
        JoinString.parse(text)


@given(st.integers(8, 150), st.text(max_size=3))
def test_damaged_in_copying(place: int, noise: str) -> None:
    text = join().encode()
    with contextlib.suppress(InputError):
        JoinString.parse(text[:place] + noise + text[place + 1 :])


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "join.txt"
    path.write_text(join().encode() + "\n")
    assert read_join(f"@{path}") == join()
    assert read_join(join().encode()) == join()
    with pytest.raises(InputError, match="No such file"):
        read_join(f"@{tmp_path / 'absent'}")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="does not hold"):
        read_join(f"@{path}")
