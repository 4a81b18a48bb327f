"""Evaluations: each has `run(state) -> dict[str, float]`, and `details` of its last run for pictures and the report."""

from vit_flax.evals.classification import Classification
from vit_flax.evals.multilabel import Multilabel

EVALS = {"classification": Classification, "multilabel": Multilabel}
