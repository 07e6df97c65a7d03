"""Settings of the whole suite: reproducible, offline, one thread (tensors are small; threads have their own tests)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "longvq",
    deadline=None,  # shared machines: no test depends on time
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("longvq")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """What runs for a minute comes first: at the end the other processes would wait for it."""
    items.sort(key=lambda item: item.name != "test_python_blocks_run")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
