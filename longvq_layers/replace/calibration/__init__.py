"""Calibration: fits the codebooks to the keys that a model really makes, and measures what the swap costs."""
