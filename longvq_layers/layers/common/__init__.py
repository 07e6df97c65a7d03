"""Helpers of all layers: checks of inputs, padding, autocast, precision of parameters, `repr`."""
