"""From and to disk: models, checkpoints, tokens, what is kept between runs."""
