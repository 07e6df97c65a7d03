"""The dense definitions of every operator, written to be read; the oracle that all other backends are tested against."""
