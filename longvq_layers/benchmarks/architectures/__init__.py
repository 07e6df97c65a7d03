"""The sweep over the model types of transformers: `python -m longvq_layers.benchmarks architectures`."""
