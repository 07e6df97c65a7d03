"""The benchmark of a rotary model beyond its training length: `python -m longvq_layers.benchmarks llama`."""
