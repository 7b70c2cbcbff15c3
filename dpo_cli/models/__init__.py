"""Base models, adapters, their identity, and the embedded model."""
