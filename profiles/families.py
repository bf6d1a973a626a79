"""How the families of causal language models differ, as far as counting their weights and their memory goes.

A config.json says how wide a model is, and mostly not which of its linears have a bias, how many norms a layer
has or which projections are fused: that is fixed in each family's code. Here it is, as one row a family. A
family without a row is counted as a Llama, which is right to a few percent for most; who needs exact counts
gives them (see ModelShape).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """What a family's code fixes. Norms are counted per layer, each of the hidden width."""

    gated: bool = True
    fused_qkv: bool = False
    fused_gate: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    #: Norms of a layer that have the hidden width.
    norms: int = 2
    #: RMSNorm (computed in float32) instead of LayerNorm.
    rms: bool = True
    norm_bias: bool = False
    #: Norms of queries and keys: "" for none, "head" for one of a head's width, "full" for one of all heads' width.
    qk_norm: str = ""
    #: Learned position embeddings beyond the config's count; None where positions aren't learned.
    extra_positions: int | None = None
    rotary: bool = True
    #: Whether a norm follows the embedding (bloom).
    embedding_norm: bool = False
    #: Whether the head has a bias.
    head_bias: bool = False
    #: Whether the head is the embedding, where the config does not say.
    tied: bool = False
    #: Whether the head's output is scaled, which makes one more tensor as large as the logits.
    scaled_logits: bool = False
    #: Linear layers kept as transformers' Conv1D, which are not quantized.
    conv1d: bool = False
    #: Attention with a softcap, which keeps the whole score matrix.
    keeps_scores: bool = False


LLAMA = Family()
#: The older style: no gate, a bias everywhere, LayerNorm.
GPT = Family(gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, rms=False, norm_bias=True)
FAMILIES = {
    "bloom": replace(GPT, fused_qkv=True, rotary=False, embedding_norm=True, tied=True),
    "cohere": Family(norms=1, rms=False, tied=True, scaled_logits=True),
    "falcon": replace(GPT, fused_qkv=True, qkv_bias=False, out_bias=False, mlp_bias=False, norms=1, tied=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms=4, tied=True, keeps_scores=True),
    "gemma3_text": Family(norms=4, qk_norm="head", tied=True),
    "glm4": Family(norms=4, fused_gate=True, qkv_bias=True),
    "gpt2": replace(GPT, fused_qkv=True, extra_positions=0, rotary=False, tied=True, conv1d=True),
    "gpt_neox": replace(GPT, fused_qkv=True),
    "gptj": replace(GPT, qkv_bias=False, out_bias=False, norms=1, head_bias=True),
    "granite": Family(scaled_logits=True),
    "olmo2": Family(qk_norm="full"),
    "opt": replace(GPT, extra_positions=2, rotary=False, tied=True),
    "phi": replace(GPT, norms=1, head_bias=True),
    "phi3": Family(fused_qkv=True, fused_gate=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "stablelm": Family(rms=False, norm_bias=True),
    "starcoder2": replace(GPT, tied=True),
}


@dataclass(frozen=True)
class Activation:
    """Values per unit of the MLP's inner width that an activation keeps for backward, and frees during forward."""

    kept: int
    freed: int


#: An activation that is one kernel keeps its input; relu keeps only its result, which the next LoRA adapter keeps
#: anyway. "gelu_new" and its like are written out in Python as a chain of operations that each keep something.
ACTIVATIONS = {"relu": Activation(kept=0, freed=1), "gelu_new": Activation(4, 4), "gelu_fast": Activation(4, 4)}
ONE_KERNEL = Activation(kept=1, freed=0)
