"""State space models: S4D and Mega's moving average, the scan that both use, and the S4D layer."""
