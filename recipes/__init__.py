"""The recipes that ship, as package data: `importlib.resources.files("invariance.recipes")`."""
