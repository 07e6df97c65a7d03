"""Attention modules of the user's own classes, by functions that the user registers."""
