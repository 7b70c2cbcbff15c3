"""Losses as plain functions of log-probabilities, each with its catalogue entry beside it.

torch and nothing of ours; and torch only when a loss is computed, so that settings are checked without it.
"""

from dpo_cli.losses import likelihood, pairwise, ranking

__all__ = ["likelihood", "pairwise", "ranking"]  # importing them fills the catalogue
