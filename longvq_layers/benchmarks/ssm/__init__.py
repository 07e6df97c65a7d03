"""The benchmark of the diagonal state space scan: `python -m longvq_layers.benchmarks ssm`."""
