"""What the tests of CLAVER share: a process that trains, and a process state that no test leaves to the next."""

import pytest
from accelerate.state import AcceleratorState
from train_server import TrainServer


@pytest.fixture(autouse=True)
def own_precision():
    """Accelerate keeps the precision of the last run for the whole process."""
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def server():
    with TrainServer() as started:
        yield started
