"""What calibration measures: the walk over blocks, moments, the refit, the output's Fisher."""
