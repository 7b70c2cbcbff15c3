"""Floor 2: a prompt with K completions to log-probabilities. The engine every stage shares."""
