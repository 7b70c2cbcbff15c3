"""A prompt with K completions to log-probabilities: the engine that every stage shares."""
