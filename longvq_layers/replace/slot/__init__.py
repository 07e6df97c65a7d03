"""The slot of an attention module: its interface, and the swapped attention that fills it."""
