"""Small options for every kind of block, for the tests of the models."""

import pytest

from longvq_layers.models import BLOCKS

WIDTH, VOCABULARY = 16, 30
SMALL = {
    "longvq": {"num_codes": 6, "window": 3, "d_state": 8},
    "mega": {"chunk": 4, "ema_dim": 4},
    "spade": {"window": 3, "d_state": 8, "num_heads": 2},
    "s4d": {"d_state": 8},
    "transformer": {"num_heads": 2},
}
STREAMING = [name for name in BLOCKS if name != "transformer"]
each_kind = pytest.mark.parametrize("kind", list(BLOCKS))
each_streaming = pytest.mark.parametrize("kind", STREAMING)
