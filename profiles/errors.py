"""The two ways in which this package refuses; both are plain ValueErrors to a caller who does not care which."""

from __future__ import annotations


class ProfileError(ValueError):
    """A machine profile or a model's config can't be used. The message names the file or key and what to do."""


class PlanError(ValueError):
    """No partition meets the rules. The message says what is needed, what there is, and what to do."""
