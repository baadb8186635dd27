"""Fixtures of all tests."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these are tests of a CPU; GPUs are made up or have benchmarks

import pytest
import torch
from helpers import write_folders


@pytest.fixture(autouse=True)
def one_thread():
    """Compute on one thread: beside another busy process two threads make the tests ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "pictures with spaces \u00e9")


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that no worker waits for the other at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_reliability", "test_processes", "test_readme"))
