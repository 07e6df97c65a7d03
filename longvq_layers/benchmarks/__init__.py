"""Speed measurements against plain PyTorch: `python -m longvq_layers.benchmarks NAME`."""
