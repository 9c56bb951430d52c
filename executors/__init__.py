"""Executors: the client side, training at a hospital."""
