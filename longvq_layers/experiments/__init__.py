"""Comparisons of blocks on tasks for docs/results.md: `python -m longvq_layers.experiments NAME`."""
