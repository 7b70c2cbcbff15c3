"""Settings, errors, artifacts, paths, locks, progress. No torch, no data, no models."""
