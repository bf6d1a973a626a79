"""A global adapter as an ordinary PEFT folder, for anybody who has the base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save

from hub.store.checkpoints import plain
from hub.store.files import StoreError, write_bytes_atomic
from messaging.errors import InputError
from messaging.messages import Recipe

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")

#: Readable by others, as far as the folder is: whoever exports means to pass it on.
_MODE = 0o644


def export_peft(
    tensors: Mapping[str, torch.Tensor],
    recipe: Recipe,
    base_model: str,
    out: Path,
    fan_in_fan_out: bool = False,
) -> None:
    """Write the folder that `PeftModel.from_pretrained(base, out)` loads; `tensors` by absolute peft names.

    An older PEFT folder at `out` is replaced. InputError if something else is there.
    """
    strangers = [name for name in tensors if not _NAME.fullmatch(name)]
    if strangers:
        raise ValueError(f"no LoRA tensor of the whole model: {strangers[0]}")
    _check_folder(out)
    contents = plain({name: value.float() for name, value in tensors.items()})
    write_bytes_atomic(out / _WEIGHTS, save(contents, metadata={"format": "pt"}), _MODE)
    write_bytes_atomic(out / _CONFIG, _config(recipe, base_model, fan_in_fan_out), _MODE)
    write_bytes_atomic(out / "README.md", _readme(recipe, base_model).encode(), _MODE)


def _check_folder(out: Path) -> None:
    """An empty folder to write to, a new one, or one with an older export."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in out.iterdir()]
    except FileExistsError as error:
        raise InputError(f"{out} is a file: give --out a folder") from error
    except OSError as error:
        raise StoreError(f"cannot use the folder {out}: {error.strerror}") from error
    if others and _CONFIG not in others:
        raise InputError(f"{out} is not empty and holds no adapter: give --out another folder")


def _config(recipe: Recipe, base_model: str, fan_in_fan_out: bool) -> bytes:
    """What peft itself would write, with lists in a fixed order where it has sets."""
    alpha = recipe.lora_alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
        r=recipe.lora_rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=list(recipe.target_modules),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=fan_in_fan_out,
    )
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _readme(recipe: Recipe, base_model: str) -> str:
    return f"""---
base_model: {json.dumps(base_model)}
library_name: peft
pipeline_tag: text-generation
---

# LoRA adapter for {base_model}

Trained with FedSEA by several parties together; none of them showed its text to the others. Rank
{recipe.lora_rank}, alpha {recipe.lora_alpha:g}, on {", ".join(recipe.target_modules)}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base_model!r})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

An adapter can repeat text that it was trained on: pass it on only to those who may see such text.
"""
