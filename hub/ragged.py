"""Attention over streams of different lengths in one forward, without padding and without copying a cache.

transformers lets a program register an attention function and the mask function that goes with it. This pair
wraps the one that the model would have used: a plain batch goes through unchanged; in a batch of streams
(`kv.BatchCache`) every stream's new positions attend to that stream's keys alone, with a mask of their own. All other
operations of the layer run on the whole batch at once, which is where batching pays. There each new position is a row
of its own, [positions, 1, hidden]: a prompt, a few drafted tokens and single tokens go side by side without padding.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hub.kv import BatchCache, RaggedStates

#: What asks for more of "sdpa" than a product of queries, keys and values.
_SPECIAL = ("position_bias", "softcap", "output_attentions", "s_aux")
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
        if base == "sdpa" and batch.single and attention_mask is None and kwargs.keys().isdisjoint(_SPECIAL):
            return _single_tokens(module, query.split(batch.sizes), key.items, value.items, kwargs.get("scaling")), None
        outputs = []
        queries = query.split(batch.sizes)
        for member, own_query, keys, values in zip(batch.inside, queries, key.items, value.items, strict=True):
            mask = None if attention_mask is None else attention_mask.items[member.number]
            given = run(module, member.unfold(own_query), keys, values, mask, **kwargs)[0]
            # [rows, width, heads, dim]: in memory the same as a row for each position
            outputs.append(given.reshape(-1, 1, *given.shape[2:]))
        return torch.cat(outputs), None

    return attention


def _single_tokens(
    module: Any,
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    scale: Any,
) -> torch.Tensor:
    """What transformers' "sdpa" does with one new position a row and no mask, without what it spends on each call.

    queries: [rows, heads, 1, dim] a stream. Returns [positions, 1, heads, dim].
    """
    shared = getattr(module, "num_key_value_groups", 1) > 1
    attend = torch.nn.functional.scaled_dot_product_attention
    outputs = [
        attend(query, key, value, scale=scale, enable_gqa=shared)
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs).transpose(1, 2)


def _mask_over(base: str) -> Any:
    make = ALL_MASK_ATTENTION_FUNCTIONS[base]

    def masks(**kwargs: Any) -> Any:
        batch = BATCH.get()
        if batch is None:
            return make(**kwargs)
        if base == "sdpa" and batch.single and _see_all(batch, kwargs):
            return None
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


def _see_all(batch: BatchCache, kwargs: Any) -> bool:
    """Whether every new position sees all of its stream: one position a row, no padding, no window."""
    unmasked = all(member.mask is None for member in batch.members)
    return unmasked and kwargs.get("local_size") is None and bool(kwargs.get("allow_is_causal_skip", True))
