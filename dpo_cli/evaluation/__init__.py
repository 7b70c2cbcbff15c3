"""Held-out figures, answers, divergences and what they mean; experiments compared."""
