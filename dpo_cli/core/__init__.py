"""Floor 0: parameters, errors, artifacts, paths, locks, progress. No torch, no data, no models."""
