"""What `hub serve` prints and `edge join` takes: the hub's address, its public key and a token.

fedsea1:<base64url of msgpack [host, [ctl, bulk, enrol], public key, token]>
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
from zmq.utils import z85

from messaging.errors import InputError
from messaging.transport import Channel

_PREFIX = "fedsea1:"
_TOKEN_BYTES = 16
_MOST_CHARACTERS = 1024
#: Read of a file, blank lines around the join string included: it may be a device without an end.
_MOST_IN_FILE = 16 * 1024
_HOST = re.compile(r"[0-9A-Za-z]([0-9A-Za-z._-]{0,252})|[0-9A-Fa-f:.]{2,45}(%[0-9A-Za-z]+)?")


@dataclass(frozen=True)
class HubAddress:
    """Where a hub is and who it is: host name or IP address, the ports of its channels, its public key (Z85)."""

    host: str
    ctl: int
    bulk: int
    enrol: int
    key: str

    def endpoint(self, channel: Channel) -> str:
        """The ZeroMQ address of one channel."""
        port = (self.ctl, self.bulk, self.enrol)[channel]
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{port}"


@dataclass(frozen=True)
class JoinString:
    """An address with a token that enrols a key there; the token is empty once it has served."""

    hub: HubAddress
    token: bytes = field(repr=False)

    def encode(self) -> str:
        """The text that people pass on. It is secret as long as its token is good."""
        hub = self.hub
        packed = msgpack.packb([hub.host, [hub.ctl, hub.bulk, hub.enrol], z85.decode(hub.key), self.token])
        return _PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> JoinString:
        """Read a join string. InputError says what is wrong with it."""
        text = text.strip()
        if not text.startswith(_PREFIX):
            raise InputError(f"not a join string: it begins with {_PREFIX!r}, as `hub serve` or `hub invite` prints it")
        body = text.removeprefix(_PREFIX)
        try:
            if len(body) > _MOST_CHARACTERS or not re.fullmatch(r"[0-9A-Za-z_-]+", body):
                raise ValueError("characters that do not belong there")
            fields = msgpack.unpackb(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            return _checked(fields)
        except (ValueError, binascii.Error, msgpack.UnpackException) as error:
            text = f"the join string is damaged ({error}): copy the whole line that the hub printed"
            raise InputError(text) from None


def _checked(fields: object) -> JoinString:
    """A join string from its unpacked fields; ValueError says which of them is wrong."""
    match fields:
        case [str(host), [int(ctl), int(bulk), int(enrol)], bytes(key), bytes(token)]:
            pass
        case _:
            raise ValueError("its fields are not those of a join string")
    if not _HOST.fullmatch(host):
        raise ValueError("no host name")
    if not all(type(port) is int and 0 < port < 65536 for port in (ctl, bulk, enrol)):
        raise ValueError("no port number")
    if len(key) != 32 or len(token) > 64:
        raise ValueError("no key, or no token")
    return JoinString(HubAddress(host, ctl, bulk, enrol, z85.encode(key).decode()), token)


def read_join(argument: str) -> JoinString:
    """A join string as given on the command line: the text itself, or `@FILE` with the text in it."""
    if not argument.startswith("@"):
        return JoinString.parse(argument)
    name = argument[1:]
    try:
        with Path(name).expanduser().open(encoding="ascii") as file:
            content = file.read(_MOST_IN_FILE)
    except OSError as error:
        raise InputError(f"cannot read the join string from {name}: {error.strerror}") from error
    except RuntimeError:
        raise InputError(f"cannot read the join string from {name}: there is no such user's home") from None
    except ValueError:  # not ASCII, or a name that no file can have
        raise InputError(f"{name!r} does not hold a join string") from None
    return JoinString.parse(content)


def new_token() -> bytes:
    """A token that nobody can guess."""
    return secrets.token_bytes(_TOKEN_BYTES)


def token_hash(token: bytes) -> str:
    """What the hub keeps of a token: its sha256 in hex."""
    return hashlib.sha256(token).hexdigest()
