"""Noise on smashed states, drawn on the edge from a secret key.

METHODS: the FedSEA paper's "scale" is the mean absolute value of Gaussian noise, sigma = scale * sqrt(pi / 2).
r = mean |noise| / mean |state| is the figure to compare between models.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os

import torch


class GaussianNoise:
    """Fresh Gaussian noise on every real position. `scale` in the paper's sense; `key` stays secret."""

    def __init__(self, scale: float, key: bytes) -> None:
        self.scale = scale
        self.sigma = scale * math.sqrt(math.pi / 2)
        #: mean |noise| / mean |state| of the latest states; None before the first
        self.r: float | None = None
        self._key = key
        self._generator = torch.Generator()
        self.begin("start", None)

    def begin(self, label: str, tokens: torch.Tensor | None) -> None:
        """Draw from here on what the key says for `label` and these tokens; None: noise never drawn before.

        A step that is repeated gets the same noise. Two texts never share one: the difference of what was
        sent for them would be free of it.
        """
        digest = hmac.new(self._key, label.encode(), hashlib.sha256)
        digest.update(os.urandom(32) if tokens is None else tokens.numpy().tobytes())
        self._generator.manual_seed(int.from_bytes(digest.digest()[:8], "little") >> 1)

    def __call__(self, smashed: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """smashed [rows, new, hidden]; real bool [rows, new]: padding gets no noise."""
        if self.scale == 0:
            self.r = 0.0
            return smashed
        noise = torch.randn(smashed.shape, generator=self._generator) * self.sigma
        if self.r is None or smashed.shape[1] > 1:
            self._measure(smashed.detach(), real)
        if not bool(real.all()):
            noise *= real[..., None]
        return smashed + noise.to(smashed.device, smashed.dtype)

    def _measure(self, states: torch.Tensor, real: torch.Tensor) -> None:
        mean = float(states[real.to(states.device)].abs().float().mean())
        self.r = self.scale / mean if mean else math.inf
