"""What the models of an evaluation are called in its files."""

SFT, DPO, BASE = "sft", "dpo", "base"
