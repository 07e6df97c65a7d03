"""Readers for checkpoints of other public implementations."""
