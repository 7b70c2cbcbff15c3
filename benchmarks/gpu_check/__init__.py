"""The check of a GPU in eight minutes: ``python -m benchmarks.gpu_check``."""
