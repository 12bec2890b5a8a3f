"""Recipes on types that are not rewritten: spaces of a derived layout, cut in the family's own modules."""
