"""A CUDA device that is not there: models without numbers on it, the code for CUDA run on them, its work counted."""
