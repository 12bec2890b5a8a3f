"""Whole runs: a recipe in, a folder with a checkpoint and a report out."""
