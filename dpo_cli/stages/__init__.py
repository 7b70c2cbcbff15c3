"""Floor 4: one file a stage, each ``run(params, reporter)`` that reads like its recipe."""
