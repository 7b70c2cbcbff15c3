"""The experiments of the DPO paper, run with the product's own code."""

from dpo_cli.core.environment import prepare_environment

prepare_environment()  # here, so that each process begins as dpo-cli does: nothing is downloaded
