"""Ablation studies: many recipes, one calibration, one page of results."""
