"""Aggregators: the server side, from checked updates to the global checkpoint. ``RULES`` names the rules."""

from clinifed.aggregators.rules import RULES, Rule, aggregate, rule_problems

__all__ = ["RULES", "Rule", "aggregate", "rule_problems"]
