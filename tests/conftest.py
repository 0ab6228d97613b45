"""What every test leaves as it found it."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet_again():
    """The command line turns the log on for its process, which here is everybody's."""
    log = logging.getLogger("counterpoint")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def one_thread():
    """Sums in one order: for tests that compare two trainings bit by bit, or many small ones."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
