"""The benchmark of a training step: `python -m longvq_layers.benchmarks step`."""
