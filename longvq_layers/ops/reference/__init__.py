"""The dense definitions of every operator, written to be read; the oracle of all tests."""
