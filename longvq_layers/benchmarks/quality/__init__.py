"""The benchmark of a swapped sentence encoder: `python -m longvq_layers.benchmarks quality`."""
