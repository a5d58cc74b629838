"""What holds for every test: no network, known seeds, one torch thread for each xdist worker."""

import os

# Read by the libraries when they are imported, so set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import random
import zlib

import pytest
import torch
from hypothesis import register_random, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


class _TorchRandom:
    """torch's global generator, as hypothesis wants it, so that every example replays."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis keeps only a weak reference
register_random(_torch_random)

# The same examples each time, so that a run which fails is not the one that happened to look elsewhere.
# To look elsewhere: make test ARGS=--hypothesis-profile=explore
settings.register_profile("default", deadline=None, max_examples=50, print_blob=True, derandomize=True)
settings.register_profile("explore", settings.get_profile("default"), derandomize=False)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seeds the global generators from the test's name: alike in every order and on every worker."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)
