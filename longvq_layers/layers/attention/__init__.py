"""Attention: over quantised keys (`vq`, `codebook_attention`), dense, local, cross and gated, and what they share."""
