"""One process that trains for all tests that need trainings in processes of their own."""

import pytest
from train_server import TrainServer


@pytest.fixture(scope="session")
def server():
    with TrainServer() as started:
        yield started
