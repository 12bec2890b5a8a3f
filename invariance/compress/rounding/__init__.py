"""Weights in few bits: which are rounded, what their inputs are, and the checkpoint that holds them."""
