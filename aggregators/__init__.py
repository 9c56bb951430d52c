"""Aggregators: the server side, from checked updates to the global checkpoint."""
