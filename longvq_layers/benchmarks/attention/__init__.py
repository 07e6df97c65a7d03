"""The benchmark of attention: `python -m longvq_layers.benchmarks attention`."""
