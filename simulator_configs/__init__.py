"""Runnable federations, YAML only; the header of each file is the command that runs it."""
