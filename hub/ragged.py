"""Attention over streams of different lengths in one forward, without padding and without copying a cache.

transformers lets a program register an attention function and the mask function that goes with it. This pair
wraps the one that the model would have used: a plain batch goes through unchanged; in a batch of streams
(`kv.BatchCache`) every stream's rows attend to that stream's keys alone, with a mask of their own. All other
operations of the layer run on the whole batch at once, which is where batching pays.
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
        outputs, at = [], 0
        masks = _masks_inside(attention_mask)
        for keys, values, mask in zip(key.items, value.items, masks, strict=True):
            end = at + keys.shape[0]
            outputs.append(run(module, query[at:end], keys, values, mask, **kwargs)[0])
            at = end
        return torch.cat(outputs), None

    return attention


def _masks_inside(masks: Any) -> list[Any]:
    batch = BATCH.get()
    assert batch is not None
    if masks is None:
        return [None] * len(batch.inside)
    return [masks.items[batch.members.index(member)] for member in batch.inside]


def _mask_over(base: str) -> Any:
    make = ALL_MASK_ATTENTION_FUNCTIONS[base]

    def masks(**kwargs: Any) -> Any:
        batch = BATCH.get()
        if batch is None:
            return make(**kwargs)
        width = kwargs["q_length"]
        own = []
        for member in batch.members:
            past = member.cache.past
            own.append(
                make(
                    **{
                        **kwargs,
                        "batch_size": member.last - member.first,
                        "kv_length": past + width,
                        "q_offset": past,
                        "attention_mask": member.mask,
                    }
                )
            )
        return RaggedStates(tuple(own))

    return masks
