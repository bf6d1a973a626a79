"""The loss in pieces is the loss in the whole, and its gradient that one's, whatever the model does with logits."""

from __future__ import annotations

from functools import cache
from typing import cast

import pytest
import torch
from transformers import Gemma2Config, PreTrainedModel

from blocks import adapters
from blocks.partition import Partition
from blocks.remote import build_edge, remote_of
from blocks.surgery import CutModel, load
from edge import loss
from edge.data import Batch
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from edge.pipeline import Pipeline
from tests.support.models import _GQA, CONFIGS, CPU, MORE_CONFIGS, source_of, whole_model
from tools.bench_memory import Echo

CAPPED = {"gemma2 capped": lambda: Gemma2Config(**_GQA, head_dim=16, final_logit_softcapping=0.5)}
ALL = {**CONFIGS, **MORE_CONFIGS, **CAPPED}


@cache
def whole(name: str) -> PreTrainedModel:
    return whole_model(ALL[name]())


def edge(name: str) -> CutModel:
    config = whole(name).config
    cut = load(build_edge(config, Partition(1, 1), torch.float32), source_of(whole(name)), torch.float32, CPU)
    adapters.inject(cut, adapters.make_spec(config, 2, 4))
    torch.manual_seed(1)
    for parameter in adapters.parameters(cut).values():
        parameter.data.normal_(0, 0.05)
    remote_of(cut).attach(Echo())
    return cut


def a_batch(packed: bool = False) -> Batch:
    ids = torch.randint(3, 120, (3, 12), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, :4], labels[1, 9:], labels[2, 5] = -100, -100, -100
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].repeat(3, 1)
    return Batch(ids, labels, None if packed else mask, positions if packed else None, 25)


def loss_and_gradients(cut: CutModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    for parameter in adapters.parameters(cut).values():
        parameter.grad = None
    pipeline = Pipeline(cut, cast(HubMiddle, remote_of(cut).middle), GaussianNoise(0.0, b""), 1)
    value = pipeline.step(0, [batch], lambda: None).loss
    grads = {name: p.grad.clone() for name, p in adapters.parameters(cut).items() if p.grad is not None}
    return value, grads


@pytest.mark.parametrize("name", ALL)
def test_pieces_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, batch = edge(name), a_batch()
    monkeypatch.setattr(loss, "PIECE", 7 * 120)
    assert loss._base(cut) is not None
    value, grads = loss_and_gradients(cut, batch)
    with torch.no_grad():
        assert float(loss.summed_loss(cut, batch)) == pytest.approx(value, rel=1e-6)
    monkeypatch.setattr(loss, "_base", lambda cut: None)
    wanted, wanted_grads = loss_and_gradients(cut, batch)
    assert value == pytest.approx(wanted, rel=1e-5)
    assert grads.keys() == wanted_grads.keys()
    assert len(grads) > 0
    for key, grad in grads.items():
        assert torch.allclose(grad, wanted_grads[key], rtol=1e-4, atol=1e-5 * float(wanted_grads[key].abs().max()))


def test_a_scaled_loss_has_scaled_gradients() -> None:
    cut, batch = edge("llama"), a_batch()
    found = []
    for scale in (1.0, 8.0):
        for parameter in adapters.parameters(cut).values():
            parameter.grad = None
        (scale * loss.summed_loss(cut, batch)).backward()
        found.append({name: p.grad for name, p in adapters.parameters(cut).items() if p.grad is not None})
    assert found[0]
    assert all(torch.allclose(8 * grad, found[1][key]) for key, grad in found[0].items())


def test_packed_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, batch = edge("llama"), a_batch(packed=True)
    value, _ = loss_and_gradients(cut, batch)
    monkeypatch.setattr(loss, "_base", lambda cut: None)
    assert value == pytest.approx(loss_and_gradients(cut, batch)[0], rel=1e-5)


def test_no_piece_has_more_logits_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, seen = edge("llama"), []
    monkeypatch.setattr(loss, "PIECE", 7 * 120)
    head = cut.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    loss_and_gradients(cut, a_batch())
    # 28 of the 33 shifted positions have a target: four pieces, and none for the others
    assert max(seen) <= 7 * 120
    assert sum(seen) == 120 * int((a_batch().labels[:, 1:] != -100).sum())


def test_a_batch_without_targets_has_no_loss() -> None:
    cut, batch = edge("llama"), a_batch()
    batch.labels[:] = -100
    value, grads = loss_and_gradients(cut, batch)
    assert value == 0
    assert all(not grad.any() for grad in grads.values())


def test_a_head_that_trains_is_left_in_the_whole() -> None:
    cut = edge("llama")
    cut.model.get_output_embeddings().weight.requires_grad_()
    assert loss._base(cut) is None
    cut.model.get_output_embeddings().weight.requires_grad_(False)
    cut.model.loss_function = lambda **_: torch.zeros(())
    assert loss._base(cut) is None
