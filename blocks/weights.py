"""Weights from safetensors files, tensor by tensor: nothing that is not hosted is ever read.

Files are read with plain reads into the tensor's own memory, never mapped: mapped pages count as this
process's memory and would double its peak.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from blocks.raw import raw_bytes
from messaging.errors import InputError

#: safetensors dtype name -> torch dtype
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PIECE = 8 << 20


@dataclass(frozen=True)
class TensorInfo:
    """name, dtype and shape of a tensor in a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class WeightSource(Protocol):
    """Where weights come from: a folder, the Hugging Face hub, or the FedSEA hub over the wire."""

    def names(self) -> Iterable[str]:
        """Every tensor in the checkpoint, hosted here or not."""

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of one."""

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor, in memory of its own, floating-point values as `dtype`."""


class FileSource:
    """A checkpoint's safetensors files, by an index from tensor name to (file, offset)."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._where: dict[str, tuple[Path, int, TensorInfo]] = {}
        for file in files:
            self._where.update(read_header(file))

    def names(self) -> Iterable[str]:
        """See WeightSource."""
        return self._where.keys()

    def info(self, name: str) -> TensorInfo:
        """See WeightSource."""
        return self._where[name][2]

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See WeightSource."""
        _, _, info = self._where[name]
        target = dtype if info.dtype.is_floating_point else info.dtype
        out = torch.empty(info.shape, dtype=target)
        if out.numel() == 0:
            return out
        if target == info.dtype:
            self.read_bytes(name, 0, raw_bytes(out))
        else:
            self._read_converted(name, info, out.view(-1))
        return out

    def read_bytes(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on. Raises InputError where the file ends early."""
        path, start, _ = self._where[name]
        with path.open("rb", buffering=0) as file:
            file.seek(start + offset)
            done = 0
            while done < len(buffer):
                got = file.readinto(buffer[done : done + _PIECE])
                if not got:
                    raise InputError(f"{path} is cut short: download the model again")
                done += got

    def _read_converted(self, name: str, info: TensorInfo, flat: torch.Tensor) -> None:
        # Piece by piece, so that converting a large embedding does not hold it twice. The piece lies in a map of
        # its own: large blocks that come and go on the heap raise glibc's mmap threshold and leave holes.
        elements = min(_PIECE // info.dtype.itemsize, flat.numel())
        room = mmap.mmap(-1, elements * info.dtype.itemsize)
        piece = torch.frombuffer(room, dtype=info.dtype)
        raw = memoryview(room)
        for at in range(0, flat.numel(), elements):
            n = min(elements, flat.numel() - at)
            self.read_bytes(name, at * info.dtype.itemsize, raw[: n * info.dtype.itemsize])
            flat[at : at + n] = piece[:n]


class Watched:
    """Weights whose reading is watched: `advance` gets the bytes of each tensor that was read."""

    def __init__(self, source: WeightSource, advance: Callable[[float], None]) -> None:
        self._source = source
        self._advance = advance

    def names(self) -> Iterable[str]:
        """See WeightSource."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """See WeightSource."""
        return self._source.info(name)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See WeightSource."""
        tensor = self._source.read(name, dtype)
        self._advance(self._source.info(name).nbytes)
        return tensor


def read_header(file: Path) -> dict[str, tuple[Path, int, TensorInfo]]:
    """tensor name -> (file, byte offset of its data, info). Raises InputError on anything but safetensors."""
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > 100 << 20:
                raise ValueError("header too long")
            header = json.loads(handle.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header names no tensors")
        start, found = 8 + length, {}
        for name, entry in header.items():
            if name != "__metadata__":
                offset, info = _entry(name, entry)
                found[name] = (file, start + offset, info)
        return found
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{file} is no readable safetensors file ({error})") from error


def _entry(name: str, entry: Any) -> tuple[int, TensorInfo]:
    """Where one tensor's data begin, counted from the header's end, and what it is."""
    begin, end = (int(offset) for offset in entry["data_offsets"])
    info = TensorInfo(name, SAFETENSORS_DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
    if begin < 0 or min(info.shape, default=0) < 0 or end - begin != info.nbytes:
        raise ValueError(f"its header and {name} do not agree")
    return begin, info
