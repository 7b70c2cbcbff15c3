"""Answers to instructions (Rafailov et al. 2023, sections 6.2 and 6.3), on the embedded world."""

from experiments.answers.run import EXPERIMENT

__all__ = ["EXPERIMENT"]
