"""Is the tuned model better, by how much, how surely, and at what cost."""

SFT, DPO, BASE = "sft", "dpo", "base"
"""What the models of an evaluation are called in its files."""
