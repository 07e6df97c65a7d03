"""Distillation: trains the codes of swapped attention towards the original attention."""
