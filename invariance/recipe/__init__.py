"""The recipe: what may be asked for, in YAML whose mistakes are told with their line."""
