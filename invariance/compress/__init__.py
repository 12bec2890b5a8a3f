"""From a recipe and a model to a smaller model: plan, calibrate, fit, allocate, cut, round."""
