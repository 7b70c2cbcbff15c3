"""Losses as plain functions of log-probabilities, each with its catalogue entry beside it.

torch and nothing of ours; and torch only when a loss is computed, so that settings are checked without it.
"""

from dpo_cli.losses import batchwise, likelihood, pairwise, ranking, reference_free

__all__ = ["batchwise", "likelihood", "pairwise", "ranking", "reference_free"]  # importing them fills the catalogue
