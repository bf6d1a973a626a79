"""What a model consists of, in a form that can be hashed, sent and held against another copy.

The manifest is JSON without whitespace and with sorted keys:

    {"config": <config.json>, "files": {name: [bytes, sha256]}, "format": 1,
     "tensors": {name: [dtype, shape, sample]}}

`sample` is the sha256 of dtype, shape and the first and last 4 KiB of the data: it costs the same for any
size. The model's hash is the sha256 of the manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from blocks.source import CONFIG, SMALL_FILES, ModelFiles, RawSource, parse_config
from blocks.weights import SAFETENSORS_DTYPES, TensorInfo
from messaging.errors import InputError, ProtocolError

#: The most that each part of a model may have. Whoever serves more is refused.
MAX_MANIFEST_BYTES = 64 << 20
MAX_FILE_BYTES = 64 << 20
MAX_TENSOR_BYTES = 64 << 30

#: safetensors' name of each dtype
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

_FORMAT = 1
_SAMPLE_BYTES = 4096
_MAX_DIMS = 8
#: `tensor/NAME` has to fit into a Fetch.
_MAX_NAME = 500
#: Fields of a config that may differ between copies of the same model.
_INCIDENTAL = re.compile(
    r"_name_or_path|transformers_version|architectures|(torch_)?dtype|use_cache|return_dict|output_.*|.*_token_id"
)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the manifest, and the sample hash of its data."""

    info: TensorInfo
    sample: str


@dataclass(frozen=True)
class FileEntry:
    """A small file in the manifest: bytes and sha256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest. All file names are among SMALL_FILES; tensor names are whatever was sent."""

    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]


def make_manifest(files: ModelFiles) -> bytes:
    """The manifest of a model; reads a little of every tensor."""
    tensors = {}
    for name in files.source.names():
        info = files.source.info(name)
        tensors[name] = [DTYPE_NAMES[info.dtype], list(info.shape), sample(files.source, info)]
    small = {}
    for name, path in files.files.items():
        data = path.read_bytes()
        small[name] = [len(data), hashlib.sha256(data).hexdigest()]
    config = json.loads(files.files[CONFIG].read_bytes())
    whole = {"format": _FORMAT, "config": config, "tensors": tensors, "files": small}
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()


def model_hash(manifest: bytes) -> str:
    """The model's hash, by which edges and hub know that they mean the same."""
    return hashlib.sha256(manifest).hexdigest()


def sample(source: RawSource, info: TensorInfo) -> str:
    """The sample hash of a tensor; see above."""
    digest = hashlib.sha256(json.dumps([DTYPE_NAMES[info.dtype], list(info.shape)]).encode())
    buffer = bytearray(min(info.nbytes, _SAMPLE_BYTES))
    for offset in (0, info.nbytes - len(buffer)):
        source.read_bytes(info.name, offset, memoryview(buffer))
        digest.update(buffer)
    return digest.hexdigest()


def parse_manifest(data: bytes) -> Manifest:
    """A manifest that came off the wire. ProtocolError unless it is one, within the limits."""
    try:
        whole = json.loads(data)
        if whole["format"] != _FORMAT or not isinstance(whole["config"], dict):
            raise ValueError("another format")
        tensors = {name: _tensor(name, *entry) for name, entry in whole["tensors"].items()}
        # What a newer hub serves besides is of no use here, and its name must not become a path.
        known = {name: entry for name, entry in whole["files"].items() if name in SMALL_FILES}
        files = {name: _file(*entry) for name, entry in known.items()}
        if CONFIG not in files:
            raise ValueError(f"no {CONFIG}")
        return Manifest(whole["config"], tensors, files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"the hub's manifest cannot be used ({str(error)[:200]})") from error


def check_against(manifest: Manifest, files: ModelFiles, names: Iterable[str]) -> None:
    """Hold a copy of the model against the hub's, in its config and in the tensors `names`.

    InputError names the first difference.
    """
    advice = "leave out --model to use the hub's, or give the same model"
    ours = files.config.to_dict()
    theirs = parse_config(manifest.config, "the hub's model").to_dict()
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key) and not _INCIDENTAL.fullmatch(key):
            values = f"{key} is {str(ours.get(key))[:80]} in its config and {str(theirs.get(key))[:80]} in the hub's"
            raise InputError(f"{files.name} is not the hub's model: {values}: {advice}")
    for name in names:
        entry = manifest.tensors.get(name)
        if entry is None or entry.info != files.source.info(name) or entry.sample != sample(files.source, entry.info):
            raise InputError(f"{files.name} is not the hub's model: the tensor {name} differs: {advice}")


def _tensor(name: str, dtype: str, shape: list[int], digest: str) -> TensorEntry:
    fits = len(name) <= _MAX_NAME and len(shape) <= _MAX_DIMS and all(type(n) is int and n >= 0 for n in shape)
    if not fits or SAFETENSORS_DTYPES[dtype].itemsize * math.prod(shape) > MAX_TENSOR_BYTES:
        raise ValueError(f"tensor {name[:80]!r}")
    return TensorEntry(TensorInfo(name, SAFETENSORS_DTYPES[dtype], tuple(shape)), _hash(digest))


def _file(size: int, digest: str) -> FileEntry:
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise ValueError("a file's size")
    return FileEntry(size, _hash(digest))


def _hash(text: str) -> str:
    if not is_hash(text):
        raise ValueError("a hash that is none")
    return text


def is_hash(text: str) -> bool:
    """Whether this is a sha256 in hex."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None
