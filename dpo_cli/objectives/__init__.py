"""Floor 2: losses as pure functions of log-probabilities."""
