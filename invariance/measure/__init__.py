"""What models are worth and what they cost: perplexity, divergence, tasks, speed, memory."""
