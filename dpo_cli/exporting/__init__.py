"""Exports: the trained model in the forms that others load, each reloaded and held against what was trained."""
