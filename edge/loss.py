"""The loss of a batch in pieces, so that the logits of all its tokens are never there at once.

In the whole, 512 tokens of a vocabulary of 32,000 need 65 MB for each float32 copy of their logits, and the loss
makes three. Here the head, all that the model does behind it (scaling, soft-capping) and transformers' loss run on
some target tokens at a time, each piece forward and backward at once; what stays is the gradient by the hidden
states. It is the same arithmetic, but for the order of the sums, and positions without a target cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from blocks.surgery import CutModel
from edge.data import Batch

#: Logits of one piece, at most: 16 MiB in float32, 131 tokens of a vocabulary of 32,000.
PIECE = 1 << 22
_NO_TARGET = -100

#: hidden [tokens, hidden] and their targets [tokens] -> summed loss
_PieceLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def summed_loss(cut: CutModel, batch: Batch) -> torch.Tensor:
    """The loss summed over target tokens, by transformers' own loss function."""
    model, device = cut.model, cut.model.device
    labels = batch.labels.to(device)
    inputs = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": None if batch.attention_mask is None else batch.attention_mask.to(device),
        "position_ids": None if batch.position_ids is None else batch.position_ids.to(device),
    }
    base = _base(cut)
    if base is None:
        return _loss(model, model(**inputs, use_cache=False).logits, labels=labels)
    output = base(**inputs, use_cache=False)
    hidden = output[0].flatten(0, 1)  # [rows * width, hidden]
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=_NO_TARGET).flatten()
    at = (targets != _NO_TARGET).nonzero().squeeze(1)
    rows = max(1, PIECE // model.config.get_text_config().vocab_size)

    def of(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with _returning(base, type(output)(last_hidden_state=states[None])):
            logits = model(inputs_embeds=states[None], use_cache=False).logits
        return _loss(model, logits, labels=None, shift_labels=wanted)

    if hidden.requires_grad and torch.is_grad_enabled():
        loss: torch.Tensor = _InPieces.apply(hidden, targets, at, rows, of)
        return loss
    return sum((of(hidden[some], targets[some]) for some in at.split(rows)), torch.zeros((), device=device))


def _base(cut: CutModel) -> nn.Module | None:
    """The part of the model before its head, if the loss can be taken in pieces behind it; None if not.

    That is so where the loss is the usual one, and what is behind has nothing to train.
    """
    model, head = cut.model, cut.model.get_output_embeddings()
    parent = cut.names.prefix.rpartition(".")[0]
    if not parent or head is None or model.loss_function is not ForCausalLMLoss:
        return None
    return None if any(parameter.requires_grad for parameter in head.parameters()) else model.get_submodule(parent)


@contextmanager
def _returning(base: nn.Module, output: Any) -> Iterator[None]:
    """Let `base` return this, so that the model's own code does all that follows."""
    base.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del base.forward


def _loss(model: Any, logits: torch.Tensor, **targets: torch.Tensor | None) -> torch.Tensor:
    vocab = model.config.get_text_config().vocab_size
    one = torch.tensor(1.0, device=logits.device)
    loss: torch.Tensor = model.loss_function(logits=logits, vocab_size=vocab, num_items_in_batch=one, **targets)
    return loss


class _InPieces(torch.autograd.Function):
    """The sum of `of` over pieces of at most `rows` target tokens; each piece's graph is gone before the next."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, at: torch.Tensor, rows: int, of: _PieceLoss
    ) -> torch.Tensor:
        grads, total = torch.zeros_like(hidden), torch.zeros((), device=hidden.device)
        for some in at.split(rows):
            with torch.enable_grad():
                states = hidden[some].detach().requires_grad_()
                loss = of(states, targets[some])
                (grads[some],) = torch.autograd.grad(loss, states)
            total += loss.detach()
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (by_hidden,) = ctx.saved_tensors
        return by_hidden * grads[0].to(by_hidden.dtype), None, None, None, None
