"""Residual blocks: a mixer of positions (SSM, attention or both), then a feed-forward block."""
