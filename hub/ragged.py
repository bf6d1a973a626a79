"""Attention over streams of different lengths in one forward, without padding and without copying a cache.

transformers lets a program register an attention function and the mask function that goes with it. This pair
wraps the one that the model would have used: a plain batch goes through unchanged; in a batch of streams
(`kv.BatchCache`) every stream's new positions attend to that stream's keys alone, with a mask of their own. All other
operations of the layer run on the whole batch at once, which is where batching pays. There each new position is a row
of its own, [positions, 1, hidden]: a prompt, a few drafted tokens and single tokens go side by side without padding.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hub.kv import BatchCache, RaggedStates

#: The batch of streams that this thread runs; None for a plain batch.
BATCH: ContextVar[BatchCache | None] = ContextVar("batch", default=None)


def supports(model: PreTrainedModel) -> bool:
    """Whether the architecture hands keys and values straight to an attention function."""
    return bool(getattr(model, "_supports_attention_backend", False))


def install(model: PreTrainedModel) -> None:
    """Give this model (and no other) the wrapped attention."""
    base = model.config._attn_implementation
    name = f"fedsea_{base}"
    AttentionInterface.register(name, _attention_over(base))
    AttentionMaskInterface.register(name, _mask_over(base))
    model.set_attn_implementation(name)


def _attention_over(base: str) -> Any:
    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(base, own)
        if not isinstance(key, RaggedStates):
            return run(module, query, key, value, attention_mask, **kwargs)
        batch = BATCH.get()
        assert batch is not None
        outputs = []
        queries = query.split(batch.sizes)
        for member, own_query, keys, values in zip(batch.inside, queries, key.items, value.items, strict=True):
            mask = None if attention_mask is None else attention_mask.items[member.number]
            given = run(module, member.unfold(own_query), keys, values, mask, **kwargs)[0]
            # [rows, width, heads, dim]: in memory the same as a row for each position
            outputs.append(given.reshape(-1, 1, *given.shape[2:]))
        return torch.cat(outputs), None

    return attention


def _mask_over(base: str) -> Any:
    make = ALL_MASK_ATTENTION_FUNCTIONS[base]

    def masks(**kwargs: Any) -> Any:
        batch = BATCH.get()
        if batch is None:
            return make(**kwargs)
        own = []
        for member in batch.members:
            past = member.cache.past
            own.append(
                make(
                    **{
                        **kwargs,
                        "batch_size": member.rows,
                        "q_length": member.width,
                        "kv_length": past + member.width,
                        "q_offset": past,
                        "attention_mask": member.mask,
                    }
                )
            )
        return RaggedStates(tuple(own))

    return masks
