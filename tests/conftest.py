"""Settings of all tests: fixed random numbers, no network, one thread (tests of several threads set their number)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "longvq",
    deadline=None,  # a busy machine may take any time
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("longvq")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Long tests start first: one that starts last keeps a single process busy while the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
