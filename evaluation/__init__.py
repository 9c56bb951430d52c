"""Evaluation: what a model is worth, on data that may be reported."""
