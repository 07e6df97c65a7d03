"""The run on a GPU: `python -m longvq_layers.benchmarks gpu`."""
