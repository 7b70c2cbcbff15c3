"""Floor 2: base models, adapters, their identity, and the embedded model."""
