"""Training after slicing."""
