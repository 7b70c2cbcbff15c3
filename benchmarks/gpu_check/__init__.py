"""The check of a GPU in eight minutes: ``python -m benchmarks.gpu_check``."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
