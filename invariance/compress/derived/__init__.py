"""Recipes on types that nobody declared: spaces of a derived layout, cut in the family's own modules."""
