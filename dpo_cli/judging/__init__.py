"""Judges, of which each says which of two answers is better, and what comes of asking them."""
