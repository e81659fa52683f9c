import threading
import weakref

import pytest
import torch

from kronmask import device_cache, masks
from kronmask.backends import flex, sdpa
from kronmask.device_cache import kept_on_device
from kronmask.kernels.tiles import Blocks, make_tables

CPU = torch.device("cpu")
MASK = masks.neighborhood(8, 196)


class Made:
    def __init__(self) -> None:
        self.thread = threading.current_thread()


def counted(maxsize):
    made = []

    @kept_on_device(maxsize)
    def make(name: str, device: torch.device) -> Made:
        """What it makes."""
        made.append(name)
        return Made()

    return make, made


def test_results_are_kept_until_others_take_their_place():
    make, made = counted(1)
    assert make("a", CPU) is make("a", CPU)
    make("b", CPU)
    make("a", CPU)
    make.cache_clear()
    make("a", CPU)
    assert made == ["a", "b", "a", "a"]
    assert (make.__name__, make.__doc__) == ("make", "What it makes.")


def test_what_a_captured_graph_reads_is_never_dropped(monkeypatch):
    make, _ = counted(1)
    gpu = torch.device("cuda")
    monkeypatch.setattr(device_cache, "_captured", {})
    monkeypatch.setattr(device_cache, "_needs_a_thread", lambda device: False)
    dropped = weakref.ref(make("before", gpu))
    monkeypatch.setattr(device_cache, "_is_capturing", lambda: True)
    captured = weakref.ref(make("captured", gpu))
    monkeypatch.setattr(device_cache, "_is_capturing", lambda: False)
    make("after", gpu)
    assert dropped() is None
    assert captured() is not None


def test_on_a_gpu_another_thread_makes_it(monkeypatch):
    synchronized = []

    class Stream:
        def synchronize(self):
            synchronized.append(threading.current_thread())

    make, _ = counted(4)
    monkeypatch.setattr(torch.cuda, "device", torch.device)  # any context will do
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    made = make("a", torch.device("cuda", 1))
    assert made.thread is not threading.current_thread()
    assert synchronized == [made.thread]
    assert make("b", CPU).thread is threading.current_thread()


def test_an_error_reaches_the_caller_and_is_not_kept():
    @kept_on_device(4)
    def fail(name: str, device: torch.device) -> None:
        raise MemoryError(name)

    for _ in range(2):
        with pytest.raises(MemoryError, match="tables"):
            fail("tables", CPU)


@pytest.mark.parametrize("kept", ["tables", "tiles", "bias", "blocks"])
def test_what_inference_mode_asks_for_first_can_be_trained_on_later(kept):
    for function in (make_tables, sdpa._tiles, sdpa._bias, flex._block_mask):
        function.cache_clear()
    with torch.inference_mode():
        tensors = {
            "tables": lambda: [make_tables((MASK,), Blocks(16, 16), "token", CPU).rows],
            "tiles": lambda: [sdpa._tiles(MASK, torch.float32, CPU)[0].queries],
            "bias": lambda: sdpa._bias(MASK, torch.float32, CPU),
            "blocks": lambda: [flex._block_mask(MASK, "AUTO", CPU).kv_indices],
        }[kept]()
    assert not any(tensor.is_inference() for tensor in tensors)
