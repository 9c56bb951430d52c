"""Aggregators: the server side, from checked updates to the global checkpoint. ``RULES`` names the rules."""

from clinifed.aggregators.fedavg import fedavg

__all__ = ["RULES"]

RULES = {"fedavg": fedavg}
