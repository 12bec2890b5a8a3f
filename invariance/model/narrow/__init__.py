"""Coordinates of derived spaces cut out of a model's own modules."""
