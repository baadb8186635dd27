"""Fixtures of all tests."""

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
