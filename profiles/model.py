"""A model's shape: what the planner needs to know about a causal language model, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from profiles.errors import ProfileError
from profiles.families import ACTIVATIONS, FAMILIES, LLAMA, ONE_KERNEL, Activation, Family

#: The names that families use for the same thing, in the order of looking.
ALIASES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
    "activation": ("hidden_act", "activation_function", "hidden_activation", "activation"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok",),
}


@dataclass(frozen=True)
class ModelShape:
    """A causal language model of `layers` decoder layers.

    The counts are parameters: `layer_params` layer by layer, `embed_params` with positions and the norm after the
    embedding, `head_params` with the final norm and, where the head is not the embedding (`tied`), the head.
    `layer_linears`: those of `layer_params` that are weights of plain linear layers, which can be quantized;
    `head_linears`: the same of `head_params`.
    `adapted` are the linears of one layer that get a LoRA adapter, each as (inputs, outputs).
    `active_share` is the part of a layer's weights that one token uses (below 1 for mixtures of experts).
    Who knows the real counts (from the model on the meta device, or its files) replaces these with
    `dataclasses.replace`; `shape_from_config` derives them from the config, exactly for the families it knows.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    layer_params: tuple[int, ...]
    layer_linears: tuple[int, ...]
    head_linears: int
    embed_params: int
    head_params: int
    adapted: tuple[tuple[int, int], ...]
    active_share: float
    activation: Activation
    softcapped_logits: bool
    experts: int
    experts_per_token: int
    family: Family

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.kv_heads * self.head_dim

    @property
    def adapter_values_per_rank(self) -> int:
        """Values of one layer's adapters for each unit of rank: A has r x inputs, B has outputs x r."""
        return sum(inputs + outputs for inputs, outputs in self.adapted)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that this config describes: config.json parsed, or better `config.to_dict()`.

    The second has the defaults, which the file may leave out. Raises ProfileError where a size is missing.
    """
    config = config.get("text_config") or config
    family = FAMILIES.get(str(config.get("model_type")), LLAMA)
    hidden, heads, layers = _size(config, "hidden"), _size(config, "heads"), _size(config, "layers")
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = _kv_heads(config, heads)
    experts = _find(config, "experts") or 0
    tied = bool(config.get("tie_word_embeddings", family.tied))
    inner = (experts and config.get("moe_intermediate_size")) or _find(config, "inner") or 4 * hidden
    attention = _attention_linears(family, hidden, heads * head_dim, kv_heads * head_dim)
    mlp = _mlp_linears(family, hidden, inner)
    rest = _norm_params(family, hidden, heads, kv_heads, head_dim)
    per_token = (_find(config, "experts_per_token") or 1) if experts else 1
    router = experts * hidden
    dense = _params(attention, family.qkv_bias, family.out_bias) + rest + router
    expert = _params(mlp, family.mlp_bias, family.mlp_bias)
    layer = dense + max(experts, 1) * expert
    return ModelShape(
        layers=layers,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=_size(config, "vocab"),
        tied=tied,
        layer_params=(layer,) * layers,
        layer_linears=(0 if family.conv1d else _params(attention if experts else attention + mlp, False, False),)
        * layers,
        head_linears=0 if tied else _size(config, "vocab") * hidden,
        embed_params=_embed_params(config, family, hidden),
        head_params=_head_params(config, family, hidden, tied),
        adapted=attention if experts else attention + mlp,
        active_share=(dense + per_token * expert) / layer,
        activation=ACTIVATIONS.get(str(_find(config, "activation")), ONE_KERNEL),
        softcapped_logits=bool(config.get("final_logit_softcapping")),
        experts=experts,
        experts_per_token=per_token,
        family=family,
    )


Linears = tuple[tuple[int, int], ...]


def _attention_linears(family: Family, hidden: int, width: int, kv_width: int) -> Linears:
    """The projections of attention as (inputs, outputs), the output projection last."""
    if family.fused_qkv:
        return (hidden, width + 2 * kv_width), (width, hidden)
    return (hidden, width), (hidden, kv_width), (hidden, kv_width), (width, hidden)


def _mlp_linears(family: Family, hidden: int, inner: int) -> Linears:
    """The linears of the MLP (of one expert) as (inputs, outputs), the one back to the hidden width last."""
    if not family.gated:
        return (hidden, inner), (inner, hidden)
    if family.fused_gate:
        return (hidden, 2 * inner), (inner, hidden)
    return (hidden, inner), (hidden, inner), (inner, hidden)


def _params(linears: Linears, inner_bias: bool, last_bias: bool) -> int:
    """Weights and biases of linears of which the last may differ in having a bias."""
    weights = sum(inputs * outputs for inputs, outputs in linears)
    biases = inner_bias * sum(outputs for _, outputs in linears[:-1]) + last_bias * linears[-1][1]
    return weights + biases


def _norm_params(family: Family, hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Parameters of all norms in one layer."""
    qk_norm = {"": 0, "head": 2 * head_dim, "full": (heads + kv_heads) * head_dim}[family.qk_norm]
    return family.norms * hidden * (1 + family.norm_bias) + qk_norm


def _embed_params(config: Mapping[str, Any], family: Family, hidden: int) -> int:
    """Token embedding, learned positions, and the norm that may follow."""
    rows = _size(config, "vocab")
    if family.extra_positions is not None:
        rows += _size(config, "positions") + family.extra_positions
    return rows * hidden + 2 * hidden * family.embedding_norm


def _head_params(config: Mapping[str, Any], family: Family, hidden: int, tied: bool) -> int:
    """Final norm, and the LM head unless it is the embedding."""
    head = 0 if tied else _size(config, "vocab") * (hidden + family.head_bias)
    return hidden * (1 + family.norm_bias) + head


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """Key and value heads: falcon says "one" with a flag, which its newer architecture ignores."""
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return _find(config, "kv_heads") or heads


def _find(config: Mapping[str, Any], what: str) -> Any:
    """The value under the first of the family's names for it that the config has; None where it has none."""
    return next((config[name] for name in ALIASES[what] if config.get(name) is not None), None)


def _size(config: Mapping[str, Any], what: str) -> int:
    value = _find(config, what)
    if not isinstance(value, int) or value < 1:
        raise ProfileError(f"the model's config does not say its {what}: looked for {', '.join(ALIASES[what])}")
    return value
