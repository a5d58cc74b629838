"""What holds for every test: the same environment, no network, known seeds, one torch thread for each xdist worker."""

import atexit
import os
import re
import shutil
import tempfile

# All else that a user's environment says, of terminals, languages, caches and accounts, is hidden from the tests, and
# so is what lies in the user's home. The libraries read it when they are imported, so this stands before any of them.
KEPT = re.compile(
    r"PATH|LD_LIBRARY_PATH|TMPDIR|TEMP|SYSTEMROOT|VIRTUAL_ENV|PYTHON(PATH|HOME|HASHSEED)"  # what runs Python,
    r"|(ATEN|OMP|MKL|CUDA|NVIDIA|HIP|BNB|GLOO)_\w+"  # chooses among kernels and devices,
    r"|CI|(PYTEST|HYPOTHESIS|COV|LLAMA_CPP)_\w+"  # or is meant for the tests
)
HOME = os.environ.get("HOME", "")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers get the home of the process that started them
    HOME = tempfile.mkdtemp(prefix="funclora-tests-")
    atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for name in [*os.environ]:
    if not KEPT.fullmatch(name):
        del os.environ[name]
os.environ |= {
    "HOME": HOME, "USERPROFILE": HOME, "USER": "tester", "TORCHINDUCTOR_CACHE_DIR": f"{HOME}/inductor",
    "FUNCLORA_CACHE_DIR": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "LC_ALL": "C.UTF-8", "TZ": "UTC", "COLUMNS": "80",
}  # fmt: skip

import random
import sys
import zlib
from typing import Any

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
settings.register_profile("quick", settings.get_profile("default"), max_examples=10)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seeds the global generators from the test's name: alike in every order and on every worker."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test marked `cuda` computes."""
    chosen = torch.device(request.config.getoption("device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return chosen


# --- make quick ------------------------------------------------------------------------------------------------

STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "tables of dtypes in float32 only, nothing slow, few random examples; tests that start a process are skipped"
    parser.addoption("--quick", action="store_true", help=text)
    parser.addoption(
        "--device", default="cuda", help="what the tests marked cuda run on: cpu shows that they are right"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        settings.load_profile("quick")
        sys.addaudithook(skip_starts)


def skip_starts(event: str, args: tuple[Any, ...]) -> None:
    if event in STARTS and "PYTEST_CURRENT_TEST" in os.environ:
        pytest.skip("starts a process")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        left_out = [item for item in items if not is_quick(item)]
        items[:] = [item for item in items if is_quick(item)]
        config.hook.pytest_deselected(items=left_out)


def is_quick(item: pytest.Item) -> bool:
    values = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    dtypes = {value for value in values if isinstance(value, torch.dtype)}
    return item.get_closest_marker("slow") is None and dtypes <= {torch.float32}
