"""Two institutions with private text, and what plain transformers and peft make of the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge.data import eval_batches, load_examples
from tools.pocket.text import private_notes

POCKET = Path(__file__).parents[2] / "hub" / "pocket"
#: Of every edge that `Programs.edge` starts.
BATCH, SEQ = 2, 48


def write_notes(folder: Path, site: str, first: int, count: int) -> Path:
    """Notes of one site, as a .jsonl file."""
    path = folder / f"{site}-{first}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in private_notes(site, first, count)))
    return path


def whole_model() -> Any:
    """The pocket model, unsplit, float32."""
    return AutoModelForCausalLM.from_pretrained(POCKET, dtype="float32").eval()


def tokenizer() -> Any:
    """The pocket model's."""
    return AutoTokenizer.from_pretrained(POCKET)


def mean_loss(model: Any, held_out: Path) -> float:
    """Mean loss per target token, as transformers computes it."""
    words = tokenizer()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in eval_batches(load_examples([held_out], words, SEQ), BATCH, SEQ, False, words.pad_token_id or 0):
            loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            total, tokens = total + float(loss) * batch.tokens, tokens + batch.tokens
    return total / tokens


def greedy(model: Any, prompt: str, new: int, **more: Any) -> list[int]:
    """Ids of the greedy continuation."""
    ids = tokenizer()(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=2, **more
    )
    return out[0, ids.shape[1] :].tolist()
