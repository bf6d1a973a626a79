"""A model's files, in a folder or on the Hugging Face hub: weights, config, tokenizer.

Of a model on the Hugging Face hub only those weight files are downloaded that hold a tensor somebody reads.
No code that comes with a model is ever run.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import errors as hf
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from blocks.weights import FileSource, TensorInfo, WeightSource, read_header
from messaging.errors import InputError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: The files that may stand beside the weights. No others are read, served or fetched.
SMALL_FILES = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class RawSource(WeightSource, Protocol):
    """Weights whose bytes can be had as they stand in the checkpoint."""

    def read_bytes(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on."""


class ShardedSource:
    """Weights in one or more safetensors files, each opened when the first of its tensors is asked for."""

    def __init__(self, shard_of: Mapping[str, str], find: Callable[[str], Path]) -> None:
        """`shard_of`: tensor name -> file name; `find` gives the path of a file, downloading it if need be."""
        self._shard_of = dict(shard_of)
        self._find = find
        self._opened: dict[str, FileSource] = {}
        self._opening = threading.Lock()
        self._converting = threading.Lock()

    def names(self) -> Iterable[str]:
        """See WeightSource."""
        return self._shard_of.keys()

    def info(self, name: str) -> TensorInfo:
        """See WeightSource."""
        return self._file(name).info(name)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See WeightSource. Any number of threads may read."""
        file = self._file(name)
        stored = file.info(name).dtype
        # A conversion needs memory beside the tensor's own: of however many threads, one at a time.
        with self._converting if stored.is_floating_point and stored != dtype else nullcontext():
            return file.read(name, dtype)

    def read_bytes(self, name: str, offset: int, buffer: memoryview) -> None:
        """See RawSource."""
        self._file(name).read_bytes(name, offset, buffer)

    def _file(self, name: str) -> FileSource:
        shard = self._shard_of[name]
        with self._opening:
            if shard not in self._opened:
                self._opened[shard] = FileSource([self._find(shard)])
            file = self._opened[shard]
        if name not in file.names():
            raise InputError(f"{shard} lacks the tensor {name} that its index promises: download the model again")
        return file


@dataclass(frozen=True)
class ModelFiles:
    """A model as files: `files` are those of SMALL_FILES that it has, all of them in `folder`.

    `name` is the absolute path of a local folder, else the model's name as it was given.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    source: RawSource
    files: Mapping[str, Path]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. InputError if there is none that transformers knows by itself."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a wrong file of a tokenizer may raise anything at all
            raise InputError(
                f"transformers cannot make the tokenizer of {self.name} from its files ({_short(error)}): "
                "the model needs a tokenizer.json that does without code of its own"
            ) from error

    def generation_config(self) -> GenerationConfig:
        """How the model wants to generate: its own file, or what its config implies."""
        if GENERATION_CONFIG not in self.files:
            return GenerationConfig.from_model_config(self.config)
        try:
            return GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # as above
            raise InputError(f"{self.name}: its {GENERATION_CONFIG} cannot be used ({_short(error)})") from error


def open_model(name: str) -> ModelFiles:
    """The model in the folder `name`, or of that name on the Hugging Face hub. InputError says what is wrong."""
    if not name:
        raise InputError("the model has no name: give its folder, or its name on the Hugging Face hub")
    folder = Path(os.path.abspath(os.path.expanduser(name)))
    if folder.is_dir():
        return ModelFiles(str(folder), folder, read_config(folder, name), _local_source(folder), small_files(folder))
    if folder.exists():
        raise InputError(f"{name} is a file: give the folder that holds the model's {CONFIG} and {WEIGHTS}")
    if _looks_like_path(name):
        raise InputError(f"there is no folder {name}: give a model's folder, or its name on the Hugging Face hub")
    with _hugging_face(name):
        folder = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, INDEX]))
    return ModelFiles(name, folder, read_config(folder, name), _hub_source(folder, name), small_files(folder))


def small_files(folder: Path) -> dict[str, Path]:
    """Those of SMALL_FILES that are in a folder."""
    return {name: folder / name for name in SMALL_FILES if (folder / name).is_file()}


def read_config(folder: Path, name: str) -> PreTrainedConfig:
    """The config of the model in a folder; `name` is what the user calls it. InputError if it cannot be used."""
    try:
        return parse_config(json.loads((folder / CONFIG).read_bytes()), name)
    except FileNotFoundError:
        raise InputError(f"{name} holds no {CONFIG}: it is not the folder of a transformers model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: its {CONFIG} is not readable as JSON ({_short(error)})") from error


def parse_config(fields: Any, name: str) -> PreTrainedConfig:
    """The config that the fields of a config.json describe, if it is one of a causal language model we can run."""
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"{name}: its {CONFIG} names no model_type: it is not the folder of a transformers model")
    if kind not in CONFIG_MAPPING:
        if "auto_map" in fields:
            raise InputError(f"{name} needs code of its own (trust_remote_code), which is never run: choose another")
        version = transformers.__version__
        raise InputError(f"{name}: transformers {version} knows no models of type {kind[:80]!r}: update it")
    if fields.get("quantization_config"):
        raise InputError(f"{name} is quantized, which cannot be split and trained: give the model it was made from")
    try:
        config = CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:  # a wrong value may raise anything at all
        raise InputError(f"{name}: transformers cannot use its {CONFIG} ({_short(error)})") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{name} is a model of type {kind}, which is no causal language model: choose another")
    # A config may name a kernel that transformers would fetch and run.
    config._attn_implementation = None
    config._experts_implementation = None
    return config


# --- a local folder ---------------------------------------------------------------------------


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _local_source(folder: Path) -> ShardedSource:
    if (folder / INDEX).is_file():
        return ShardedSource(_read_index(folder / INDEX), partial(_local_file, folder))
    if (folder / WEIGHTS).is_file():
        return ShardedSource(dict.fromkeys(read_header(folder / WEIGHTS), WEIGHTS), partial(_local_file, folder))
    if any(folder.glob("*.bin")):
        raise InputError(
            f"{folder} holds its weights as .bin and not as safetensors: convert them once in Python, "
            f"`AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW)`, and give the folder NEW"
        )
    raise InputError(f"{folder} holds no weights, neither {WEIGHTS} nor {INDEX}: download the model again")


def _local_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise InputError(f"{folder} lacks {name}, which its index names: download the model again")
    return path


def _read_index(path: Path) -> dict[str, str]:
    """tensor name -> name of the file beside the index that holds it."""
    try:
        shard_of = json.loads(path.read_bytes())["weight_map"]
        fit = bool(shard_of) and all(_is_shard(shard) for shard in shard_of.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no index of safetensors files ({_short(error)}): download it again") from error
    if not fit:
        raise InputError(f"{path} names files that are no safetensors beside it: download the model again")
    return dict(shard_of)


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and os.path.basename(name) == name


# --- the Hugging Face hub ---------------------------------------------------------------------


def _hub_source(folder: Path, name: str) -> ShardedSource:
    # The folder of a snapshot is named after its commit: the weights come from the same one.
    find = partial(_download, name, folder.name)
    if (folder / INDEX).is_file():
        return ShardedSource(_read_index(folder / INDEX), find)
    return ShardedSource(dict.fromkeys(read_header(find(WEIGHTS)), WEIGHTS), find)


def _download(name: str, commit: str, file: str) -> Path:
    with _hugging_face(name):
        return Path(hf_hub_download(name, file, revision=commit))


@contextmanager
def _hugging_face(name: str) -> Iterator[None]:
    """Turn what the Hugging Face client raises into InputErrors that say what to do."""
    page = f"https://huggingface.co/{name}"
    try:
        yield
    except hf.HFValidationError as error:
        raise InputError(f"{name!r} is neither a folder here nor a name that a model can have") from error
    except hf.GatedRepoError as error:
        raise InputError(f"{name} is gated: ask for access at {page}, then run `hf auth login`") from error
    except hf.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder {name} here, and no such model on the Hugging Face hub that you may see: "
            "check the name; for a private model run `hf auth login`"
        ) from error
    except (hf.LocalEntryNotFoundError, hf.OfflineModeIsEnabled) as error:
        raise InputError(
            f"there is no folder {name} here, the Hugging Face hub cannot be reached, and its cache here lacks {name}: "
            "connect this machine, or give a folder"
        ) from error
    except hf.EntryNotFoundError as error:
        raise InputError(
            f"{name} has no such file on the Hugging Face hub ({_short(error)}): "
            "choose a model whose weights are safetensors, or convert it"
        ) from error
    except Exception as error:  # the client's HTTP library has errors of its own, which depend on its version
        raise InputError(f"cannot get {name} from the Hugging Face hub ({_short(error)}): try again") from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]
