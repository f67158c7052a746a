"""What a report must say so that a failure can be reproduced: instruction set, threads, seed."""

import os

# The small products of the reference lose more to a second thread than they gain. It is read when NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import fastattn as fa  # noqa: E402
from fastattn import checks  # noqa: E402

settings.register_profile("fastattn", max_examples=200, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", max_examples=20_000, deadline=None)  # --hypothesis-profile=explore
settings.load_profile("fastattn")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")


def pytest_configure(config):
    config.addinivalue_line("markers", "compiled: needs a compiled kernel; skipped where the NumPy reference runs")


def pytest_report_header(config):
    return f"fastattn: isa {fa.isa()}, threads {fa.get_num_threads()}, seed {config.getoption('seed')}"


def pytest_collection_modifyitems(items):
    if fa.isa() != "reference":
        return
    skip = pytest.mark.skip(reason="isa() is 'reference': no compiled kernel to test")
    for item in items:
        if item.get_closest_marker("compiled"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def seed(request):
    """The number that every random input of a run is drawn from, with the case's own numbers."""
    return request.config.getoption("seed")


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """Results are NaN until something is written to them."""
    empty = checks.aligned_empty

    def poisoned(shape, dtype):
        array = empty(shape, dtype)
        array.reshape(-1).view(np.uint8).fill(0xFF)
        return array

    monkeypatch.setattr(checks, "aligned_empty", poisoned)
