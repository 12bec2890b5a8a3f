"""A derived layout as data and as text, and what works from the text alone."""
