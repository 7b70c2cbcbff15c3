"""The experiments of the DPO paper, run with the product's own code."""
