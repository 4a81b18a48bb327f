"""Evaluations: each has `run(state) -> dict[str, float]`."""

from vit_flax.evals.classification import Classification

EVALS = {"classification": Classification}
