"""Tensors and names: errors, progress, spaces, groups, changes of basis. Nothing here knows a model."""
