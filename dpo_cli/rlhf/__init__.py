"""Reinforcement learning from a reward: the pipeline that DPO replaces."""
