"""The reference model's log-probabilities, kept by content."""
