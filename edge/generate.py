"""`edge generate` and `edge chat`: text from the split model."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from edge.draft import load_draft_model, lookup_arguments, model_arguments
from edge.library import connect
from messaging.console import Journal, plain_lines
from messaging.errors import InputError


@dataclass(frozen=True)
class GenerateOptions:
    """What the command line says."""

    join: str | None
    model: str | None
    partition: str | None
    noise: float | None
    state: Path
    name: str | None
    max_new_tokens: int
    temperature: float
    seed: int
    device: str
    #: 'auto', 'off', or a draft model
    draft: str
    wire: str | None = None
    load_in: str | None = None


def generate(options: GenerateOptions, prompt: str, as_json: bool) -> None:
    """Continue a prompt once; the text streams to stdout, or one JSON line at the end."""
    model = _connect(options)
    with model.hub as hub:
        drafts = _drafts(model, options.draft)
        tokenizer = hub.tokenizer
        ids = _encode(tokenizer, prompt, model)
        sent, received = hub.traffic
        streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)
        started = time.perf_counter()
        new = _run(model, ids, options, streamer, drafts)
        seconds = time.perf_counter() - started
        if as_json:
            after_sent, after_received = hub.traffic
            print(
                json.dumps(
                    {
                        "text": _continuation(tokenizer, ids, new),
                        "tokens": new,
                        "tokens_per_s": len(new) / max(seconds, 1e-9),
                        "bytes_sent": after_sent - sent,
                        "bytes_received": after_received - received,
                        "round_trips": hub.round_trips,
                        "drafted": hub.drafted,
                        "accepted": hub.accepted,
                    }
                )
            )


def chat(options: GenerateOptions) -> None:
    """Talk, turn by turn, with the model's chat template; an empty line or Ctrl-D ends it."""
    model = _connect(options)
    with model.hub as hub:
        tokenizer = hub.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("this model has no chat template: use `edge generate`")
        drafts = _drafts(model, options.draft)
        history: list[dict[str, str]] = []
        print("Write a message; an empty line ends the chat.")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                break
            if not line:
                break
            history.append({"role": "user", "content": line})
            prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt")
            ids = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            new = _run(model, ids, options, streamer, drafts)
            history.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})


def _connect(options: GenerateOptions) -> Any:
    journal = Journal()
    with plain_lines(journal, sys.stderr):
        return connect(
            options.join,
            model=options.model,
            partition=options.partition,
            noise=options.noise,
            state=options.state,
            name=options.name,
            device=options.device,
            load_in=options.load_in,
            seed=options.seed,
            wire=options.wire,
            journal=journal,
        )


def _drafts(model: Any, draft: str) -> dict[str, Any]:
    """What `generate()` is to guess with; nothing for 'off', and where the model cannot take tokens back."""
    if draft == "off" or model._is_stateful:
        return {}
    if draft == "auto":
        return lookup_arguments()
    return model_arguments(load_draft_model(draft, model, model.hub.tokenizer), model, model.hub.tokenizer)


def _encode(tokenizer: Any, prompt: str, model: Any) -> torch.Tensor:
    """The prompt's ids [1, length]; an empty prompt begins with the model's first token."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.long()
    if ids.shape[1] == 0:
        first = model.generation_config.bos_token_id
        if first is None:
            raise InputError("this model has no token to begin an empty prompt with: give --prompt some text")
        ids = torch.tensor([[first]])
    return ids


def _run(model: Any, ids: torch.Tensor, options: GenerateOptions, streamer: Any, drafts: dict[str, Any]) -> list[int]:
    """The new token ids."""
    _check_room(model, ids.shape[1], options.max_new_tokens)
    torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    out = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=options.max_new_tokens,
        streamer=streamer,
        pad_token_id=model.generation_config.pad_token_id,
        **sampling,
        **drafts,
    )
    return [int(token) for token in out[0, ids.shape[1] :].tolist()]


def _check_room(model: Any, given: int, new: int) -> None:
    """The hub takes no more positions than the model was made for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and given + new > most:
        raise InputError(
            f"{given} tokens given and {new} new ones are more than the {most} of this model: "
            "shorten the text, or lower --max-new-tokens"
        )


def _continuation(tokenizer: Any, ids: torch.Tensor, new: list[int]) -> str:
    """The text after the prompt: decoded with the prompt, so that joining spaces are right."""
    before = tokenizer.decode(ids[0], skip_special_tokens=True)
    whole = tokenizer.decode([*ids[0].tolist(), *new], skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(new, skip_special_tokens=True))
