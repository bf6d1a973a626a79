"""How long one step takes and what it sends, predicted from the machines' figures and the link's."""

from __future__ import annotations

from profiles.machine import Machine
from profiles.model import ModelShape
from profiles.workload import Link, Workload

#: How many times faster than the edge a hub is taken to be, layer by layer, when nothing is known about it. Hubs
#: are there because edges are slow; any number above 1 gives the same plan: as little on the edge as allowed.
UNKNOWN_HUB_SPEEDUP = 4.0


def layer_seconds(model: ModelShape, machine: Machine, workload: Workload) -> float:
    """Time of one decoder layer in one step: as slow as its arithmetic or as reading its weights, whichever is slower.

    A training step is forward and backward. With frozen weights backward needs the gradient of the inputs only,
    which is as much arithmetic as the forward.
    """
    mean_params = sum(model.layer_params) / model.layers * model.active_share
    tokens = workload.batch * (workload.seq if workload.training else 1)
    # a token attends to half of the sequence on average; scores and their product with the values
    attention = 2 * workload.seq * model.attention_width
    return _roofline(machine, workload, 2 * mean_params + attention, mean_params, tokens)


def head_seconds(model: ModelShape, machine: Machine, workload: Workload) -> float:
    """Time of the LM head in one step."""
    tokens = workload.batch * (workload.seq if workload.training else 1)
    params = model.vocab * model.hidden
    return _roofline(machine, workload, 2 * params, params, tokens)


def step_bytes(model: ModelShape, workload: Workload) -> int:
    """Payload of one step in bytes, both directions: smashed and hidden, and in training the gradient of each."""
    tokens = workload.batch * (workload.seq if workload.training else 1)
    return (4 if workload.training else 2) * tokens * model.hidden * workload.value_bytes


def link_seconds(model: ModelShape, link: Link, workload: Workload, micro_batches: int) -> float:
    """Time on the link: half of the bytes each way, and a round trip for each forward and each backward."""
    half = step_bytes(model, workload) / 2
    round_trips = micro_batches * (2 if workload.training else 1)
    return round_trips * link.round_trip_s + half / link.bytes_per_s_up + half / link.bytes_per_s_down


def step_seconds(
    model: ModelShape,
    edge: Machine,
    hub: Machine | None,
    link: Link,
    workload: Workload,
    hosted: int,
    micro_batches: int,
) -> float:
    """Time of one step with `hosted` layers on the edge and the others on the hub, one part after the other."""
    edge_layer = layer_seconds(model, edge, workload)
    hub_layer = layer_seconds(model, hub, workload) if hub else edge_layer / UNKNOWN_HUB_SPEEDUP
    compute = hosted * edge_layer + (model.layers - hosted) * hub_layer + head_seconds(model, edge, workload)
    return compute + link_seconds(model, link, workload, micro_batches)


def _roofline(machine: Machine, workload: Workload, flops_per_token: float, params: float, tokens: int) -> float:
    passes = 2 if workload.training else 1
    arithmetic = flops_per_token * tokens / machine.reachable_flops(workload.dtype)
    reading = params * workload.value_bytes / machine.bandwidth_bytes_per_s
    return passes * max(arithmetic, reading)
