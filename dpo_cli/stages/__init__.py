"""One file a stage, each with a ``run`` that reads like its recipe."""
