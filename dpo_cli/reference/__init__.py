"""Floor 3: the reference model's log-probabilities, kept by content."""
