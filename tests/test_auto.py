"""`backend="auto"` on a GPU: candidates are checked, timed and remembered for each mask, shape and pass.

The GPU is a fake (CPU tensors that count as its own, and a timer that looks times up); the backends, their check against float64
and the cache are real. Triton's kernels and FlashAttention-4 refuse such tensors, and FlexAttention has no backward there.
"""

import json
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch

from kronmask import attention_backend, kron_attention, masks, tuning
from kronmask.backends import auto, dense, sdpa
from kronmask.kernels import config
from kronmask.kernels.config import Config, choose
from kronmask.kernels.tiles import KINDS

MASK = masks.kmt(4, 5)
SHAPE = (2, 2, 20, 16)


@pytest.fixture
def times(monkeypatch, tmp_path):
    """Milliseconds by candidate, to be set by the test; and `log`, of what was timed."""
    found = SimpleNamespace(ms={"sdpa": 2.0, "flex": 1.0, "wrong": 0.1, "broken": 0.1, "dense": 3.0}, log=[])

    def measure(calls, device):
        for call in calls.values():
            call()
        found.log.append(sorted(calls))
        return {name: found.ms.get(name, 5.0) for name in calls}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KRONMASK_AUTOTUNE", raising=False)
    monkeypatch.delenv("KRONMASK_AUTOTUNE_FILE", raising=False)
    monkeypatch.setattr(tuning, "is_gpu", lambda device: True)
    monkeypatch.setattr(tuning, "is_busy", lambda tensor: torch.compiler.is_compiling())
    monkeypatch.setattr(tuning, "environment", lambda device: "a fake GPU | torch 1")
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setattr(auto, "_chosen", {})
    monkeypatch.setattr(config, "_chosen", {})
    return found


def another_process(monkeypatch):
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setattr(auto, "_chosen", {})


def qkv(dtype=torch.float32, requires_grad=False):
    return [torch.randn(SHAPE).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def chosen():
    """By pass."""
    return {key.split()[1]: entry["choice"] for key, entry in json.loads(tuning.cache_file().read_text()).items()}


def test_each_pass_takes_its_fastest_and_is_measured_once(times):
    inputs = qkv(requires_grad=True)
    for _ in range(3):
        output = kron_attention(*inputs, MASK)
        grads = torch.autograd.grad(output.sum(), inputs)
    assert chosen() == {"forward": "flex", "backward": "sdpa"}  # FlexAttention's forward, but it has no backward here
    assert times.log == [["flex", "sdpa"], ["sdpa"]]
    expected = torch.autograd.grad(kron_attention(*inputs, MASK, backend="dense").sum(), inputs)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_another_process_takes_what_is_kept(times, monkeypatch):
    kron_attention(*qkv(), MASK)
    another_process(monkeypatch)
    times.ms = {"sdpa": 1.0, "flex": 2.0}
    assert auto.choose("forward", *qkv()[:2], MASK) == "flex"
    assert len(times.log) == 1


@pytest.mark.parametrize("what", ["pass", "mask", "shape", "dtype", "flash kernels", "determinism", "environment"])
def test_all_that_a_choice_depends_on_is_in_its_key(times, monkeypatch, what):
    auto.choose("forward", *qkv()[:2], MASK)
    step, mask, inputs = "forward", MASK, qkv()
    if what == "pass":
        step = "backward"
    elif what == "mask":
        mask = masks.kmct(4, 5)
    elif what == "shape":
        inputs = [x[:1] for x in inputs]
    elif what == "dtype":
        inputs = qkv(torch.bfloat16)
    elif what == "flash kernels":
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4", raising=False)
    elif what == "determinism":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        another_process(monkeypatch)
        monkeypatch.setattr(tuning, "environment", lambda device: "a fake GPU | torch 2")
    auto.choose(step, *inputs[:2], mask)
    assert len(times.log) == 2
    assert len(json.loads(tuning.cache_file().read_text())) == 2


def test_the_second_call_looks_nothing_up(times, monkeypatch):
    query, key, _ = qkv()
    auto.choose("forward", query, key, MASK)

    def fail(*args):
        raise AssertionError("looked up again")

    for name in ("recall", "may_measure", "environment", "fastest", "is_busy"):
        monkeypatch.setattr(tuning, name, fail)
    assert auto.choose("forward", query, key, MASK) == "flex"


def wrong_in(what):
    """A backend that errs in one output by a thousandth."""

    def forward(*args):
        output, lse = dense.forward(*args)
        return (output * 1.001, lse) if what == "output" else (output, lse + 1e-3) if what == "lse" else (output, lse)

    def backward(*args):
        grads = list(dense.backward(*args))
        if what.startswith("grad"):
            grads[["grad_query", "grad_key", "grad_value"].index(what)] *= 1.001
        return tuple(grads)

    return SimpleNamespace(refusal=lambda *args: None, forward=forward, backward=backward)


@pytest.mark.parametrize("what", ["output", "lse", "grad_query", "grad_key", "grad_value"])
def test_a_candidate_that_is_wrong_is_not_taken(times, monkeypatch, caplog, what):
    monkeypatch.setattr(auto, "CANDIDATES", {"sdpa": sdpa, "wrong": wrong_in(what)})
    caplog.set_level(logging.INFO, "kronmask")
    assert auto.choose("backward", *qkv()[:2], MASK) == "sdpa"
    assert f"not wrong: {what} is off by" in caplog.text
    monkeypatch.setattr(auto, "CANDIDATES", {"sdpa": sdpa, "wrong": wrong_in("nothing")})
    assert auto.choose("backward", *qkv()[:2], masks.kmct(4, 5)) == "wrong"  # the fastest, if it is right


@pytest.mark.parametrize(
    "mask",
    [
        masks.kmct(4, 5, prefix=2),
        masks.kmt(6, 5).select(query=slice(4, 6)),
        masks.neighborhood(3, 9),
        masks.joint(1, 7),
        ~masks.joint(2, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_a_right_candidate_passes_whatever_the_mask(times, monkeypatch, mask, dtype, heads):
    monkeypatch.setattr(auto, "CANDIDATES", {"sdpa": sdpa, "dense": dense})
    query = torch.empty(2, mask.shape[0], heads[0], 16, dtype=dtype).transpose(1, 2)
    key = torch.empty(2, heads[1], mask.shape[1], 16, dtype=dtype)
    assert auto.choose("backward", query, key, mask) == "sdpa"
    assert times.log == [["dense", "sdpa"]]


def test_where_all_candidates_fail_sdpa_is_taken_and_nothing_is_kept(times, monkeypatch, caplog):
    broken = SimpleNamespace(refusal=lambda *args: None, forward=lambda *args: 1 / 0)
    monkeypatch.setattr(auto, "CANDIDATES", {"broken": broken})
    for _ in range(2):
        assert auto.choose("forward", *qkv()[:2], MASK) == "sdpa"
    assert caplog.text.count("ZeroDivisionError") == 1  # and it is not tried again
    assert not tuning.cache_file().exists()


def test_without_measuring_sdpa_is_taken_at_once(times, monkeypatch):
    monkeypatch.setenv("KRONMASK_AUTOTUNE", "0")
    inputs = qkv()
    torch.testing.assert_close(
        kron_attention(*inputs, MASK), kron_attention(*inputs, MASK, backend="sdpa"), rtol=0, atol=0
    )
    assert auto.choose("forward", *inputs[:2], MASK) == "sdpa"
    assert auto.choose("forward", *(x.double() for x in inputs[:2]), MASK) == "dense"
    assert not times.log


def test_without_measuring_what_is_known_is_taken(times, monkeypatch):
    auto.choose("forward", *qkv()[:2], MASK)
    another_process(monkeypatch)
    monkeypatch.setenv("KRONMASK_AUTOTUNE", "0")
    assert auto.choose("forward", *qkv()[:2], MASK) == "flex"


def test_during_a_capture_nothing_is_measured_and_the_next_call_may(times, monkeypatch):
    monkeypatch.setattr(tuning, "is_busy", lambda tensor: True)
    assert auto.choose("forward", *qkv()[:2], MASK) == "sdpa"
    assert not times.log
    monkeypatch.setattr(tuning, "is_busy", lambda tensor: False)
    assert auto.choose("forward", *qkv()[:2], MASK) == "flex"


def test_tracing_and_exporting_measure_nothing_and_the_first_run_does(times):
    class Attend(torch.nn.Module):
        def forward(self, query):
            return kron_attention(query, query, query, MASK)

    query = qkv()[0]
    program = torch.export.export(Attend(), (query,))
    assert not times.log
    torch._dynamo.reset()
    compiled = torch.compile(Attend(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query), program.module()(query))
    assert times.log == [["flex", "sdpa"]]


def test_measuring_leaves_the_random_numbers_of_the_caller_alone(times):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    auto.choose("backward", torch.empty(SHAPE), torch.empty(SHAPE), MASK)
    assert torch.equal(torch.rand(3), expected)


def test_an_empty_batch_measures_nothing(times):
    empty = torch.empty(0, *SHAPE[1:])
    assert kron_attention(empty, empty, empty, MASK).shape == empty.shape
    assert not times.log


def test_a_forced_backend_is_not_measured(times):
    with attention_backend("dense"):
        kron_attention(*qkv(), MASK)
    assert not times.log


def test_the_cpu_takes_sdpa_and_measures_nothing(times, monkeypatch):
    monkeypatch.setattr(tuning, "is_gpu", lambda device: device.type == "cuda")
    assert auto.choose("forward", *qkv()[:2], MASK) == "sdpa"
    assert not times.log


# ---- the options of a Triton kernel ---------------------------------------------------------------------------------


def test_the_options_of_a_kernel_are_timed_each_in_its_best_layout(times, monkeypatch):
    query, ran = torch.empty(SHAPE), []
    times.ms = dict.fromkeys((f"{kind} 32x32, 4 warps, 1 stages" for kind in KINDS), 1.0)
    taken = choose("forward", MASK, query, ran.append)
    assert (taken.blocks.rows, taken.num_warps, taken.num_stages) == (32, 4, 1)
    assert {(run.blocks.rows, run.blocks.columns) for run in ran} == {(32, 32), (64, 64)}
    assert all(isinstance(run, Config) for run in ran)
    assert len(times.log) == 1
    assert choose("forward", MASK, query, ran.append) == taken
    monkeypatch.setattr(config, "_chosen", {})
    assert choose("forward", MASK, query, ran.append) == taken  # from the file
    assert len(times.log) == 1


def test_inputs_that_cannot_be_described_have_a_choice_of_their_own(times, monkeypatch):
    query = torch.empty(SHAPE)
    several = (config.Option(32, 32, 4, 1, "descriptors"), config.Option(32, 32, 4, 1), config.Option(64, 64, 4, 1))
    monkeypatch.setattr(config, "options", lambda *args: several)
    times.ms = {f"{kind} 32x32, 4 warps, 1 stages, descriptors": 1.0 for kind in KINDS}
    times.ms |= {f"{kind} 64x64, 4 warps, 1 stages": 2.0 for kind in KINDS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as the choice of the other inputs would give
        for _ in range(2):
            taken = [choose("forward", MASK, query, lambda config: None, described) for described in (True, False)]
            assert [(one.loads, one.blocks.rows) for one in taken] == [("descriptors", 32), ("pointers", 64)]
            monkeypatch.setattr(config, "_chosen", {})
    assert len(times.log) == 2


def test_a_kernel_with_one_option_is_not_timed(times, monkeypatch):
    monkeypatch.setattr(config, "options", lambda *args: (config.Option(16, 64, 4, 1),))
    assert choose("forward", masks.kmct(3, 5), torch.empty(1, 1, 15, 16), lambda config: None).blocks.rows == 16
    assert not times.log


def test_during_a_capture_the_options_of_a_kernel_are_not_timed_and_the_next_call_may(times, monkeypatch):
    ran = []
    monkeypatch.setattr(tuning, "is_busy", lambda tensor: True)
    assert choose("forward", MASK, torch.empty(SHAPE), ran.append).blocks.rows in (32, 64)
    assert not ran
    monkeypatch.setattr(tuning, "is_busy", lambda tensor: False)
    choose("forward", MASK, torch.empty(SHAPE), ran.append)
    assert ran
