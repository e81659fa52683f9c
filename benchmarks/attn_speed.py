"""How fast attention under a mask is: kronmask's backends against what users have today, on this machine.

    python benchmarks/attn_speed.py            a sensible default for the machine
    python benchmarks/attn_speed.py --quick    two minutes on two cores, into runs/benchmarks

All contenders of a case get the same numbers in the layout of a ViT, views of one `(B, L, 3, H, D)` projection, and run in turn.
Before one is timed its output and gradients, at the size that is timed, are compared to float64. A contender that is not
installed, refuses or fails is a row that says why. The peers:

    joint       SDPA without a mask: what every ratio is against. The ideal time of a mask is its density x this.
    divided     TimeSformer's two steps (arXiv 2102.05095), over frames, then over positions; the copies between them count
    sdpa_mask   SDPA with the boolean L x L mask
    flex_64     compiled FlexAttention with blocks of 64; its mask is built beforehand (`mask_seconds`)
    flex_128    the same with blocks of 128
    mha         `nn.MultiheadAttention` with a float mask of 0 and -inf, as published code does it; its projections count

and, by default only where they can run (NVIDIA's Hopper and Blackwell, with the packages installed):

    flex-flash  FlexAttention on the kernels of FlashAttention-4, `kernel_options={"BACKEND": "FLASH"}`
    sdpa-fa3    kronmask's `sdpa` on FlashAttention-3, by `torch.nn.attention.activate_flash_attention_impl`
    sdpa-fa4    the same on FlashAttention-4
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attn_contenders import CONTENDERS, PEERS, Case, Contender, dense, qkv, runs_on, timed
from attn_figures import draw
from common import (
    CAN_MEASURE_A_PROCESS,
    RESULTS,
    Times,
    available_memory,
    default_device,
    failing_into,
    interleaved,
    peak_memory,
    save,
    table,
    until_failure,
)
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from kronmask import masks
from kronmask.backends import BACKENDS

__all__ = ["main", "run_case", "useful_flops"]

PASSES = ("forward", "forward+backward")
MASK_FREE = {"joint": "joint", "divided": "temporal + spatial"}  # peers that need no mask, and what theirs is
NOTES = {"divided": "two softmaxes, another function", "mha": "with its input and output projections"}
REFERENCES = ("joint", "sdpa_mask", "flex_128")  # what the columns over_... are against
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.5e-2}  # of the norm of what float64 gives
CHECKED_ROWS = 16
SCORE_COPIES = 4  # float32 tensors of B x H x L x L that an unfused backend holds at its peak
LIMIT = 1.0  # seconds of one call over which a contender that is also SLOW times slower than joint is timed once
SLOW = 3.0

CPU = {
    "shapes": [*product((8, 16, 32), (50, 197)), *product((8, 16), (257,))],
    "batch": [1],
    "dtype": ["float32"],
    "rounds": 9,
}
CUDA: dict[str, Any] = {
    "shapes": [*product((8, 16, 32), (50, 197)), *product((8, 16), (257, 577))],
    "batch": [4],
    "dtype": ["bfloat16"],
    "rounds": 30,
}
QUICK = {"shapes": [(8, 50), (8, 197)], "rounds": 5, "peers": ["joint", "divided", "sdpa_mask", "flex_128", "mha"]}


# ---- one pass of one contender --------------------------------------------------------------------------------------


def _step(contender: Contender, case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """The call that is timed: returns the output and, with a backward pass, the gradients."""
    if case.passes == "forward":

        def forward(grad_output: Tensor | None = None) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (contender.forward(),)

        return forward
    fixed = _grad_output(case)

    def forward_and_backward(grad_output: Tensor = fixed) -> tuple[Tensor, ...]:
        output = contender.forward()
        return (output, *torch.autograd.grad(output, contender.inputs, grad_output))

    return forward_and_backward


@lru_cache(maxsize=1)
def _grad_output(case: Case) -> Tensor:
    """`(B, H, L, D)`, physically `(B, L, H, D)` as an output projection hands it back."""
    generator = torch.Generator(case.device).manual_seed(case.seed + 1)
    shape, dtype = (case.batch, case.length, case.heads, case.head_dim), getattr(torch, case.dtype)
    return torch.randn(shape, generator=generator, device=case.device, dtype=dtype).transpose(1, 2)


def _checked_rows(case: Case) -> Tensor:
    return torch.linspace(0, case.length - 1, min(case.length, CHECKED_ROWS), device=case.device).long()


def _checked_grad_output(case: Case) -> Tensor:
    """The gradient of the output, zero but for a few queries: their attention alone decides all gradients."""
    rows, grad_output = _checked_rows(case), _grad_output(case)
    return torch.zeros_like(grad_output).index_copy(2, rows, grad_output[:, :, rows])


def _check(name: str, mask_name: str, case: Case, actual: Sequence[Tensor]) -> None:
    """Compares the output at a few queries, and the gradients that they alone cause, to attention in float64.

    Raises:
        ArithmeticError: the contender does not compute what it is timed for.
    """
    if name == "divided":
        return  # a row of it depends on its whole frame: the tests compare it, on small clips
    rows = _checked_rows(case)
    given = qkv(case)[:1] * 3 if name == "mha" else qkv(case)
    query, key, value = inputs = [x.detach().double().requires_grad_() for x in given]
    scores = query[:, :, rows] @ key.mT * case.head_dim**-0.5
    scores = scores.masked_fill(~dense(mask_name, case)[rows], -math.inf)
    output = scores.softmax(-1) @ value
    expected = [output]
    if case.passes != "forward":
        grads = torch.autograd.grad(output, inputs, _grad_output(case)[:, :, rows].double())
        expected += [rearrange(sum(grads), "b h l d -> b l (h d)")] if name == "mha" else grads
    # the gradients of the projections of `mha` come last and are not looked at
    actual = [actual[0][:, :, rows], *actual[1:]]
    for what, x, y in zip(("output", "grad query", "grad key", "grad value"), actual, expected, strict=False):
        error = float((x.detach() - y.detach()).norm() / y.detach().norm())
        if not error <= TOLERANCE[case.dtype]:
            raise ArithmeticError(f"wrong result: {what} is {error:.1e} off, relative to its norm, from float64")


def _prepared_for_memory(name: str, mask_name: str, case: Case, warm: bool) -> Callable[[], object]:
    """The call whose peak is measured; `warm`: after another, so that what is made once (compiled code, plans) stands."""
    call = _step(CONTENDERS[name](case, mask_name), case)
    if warm:
        call()
    return call


# ---- a case ---------------------------------------------------------------------------------------------------------


def useful_flops(case: Case, pairs: int) -> float:
    """Multiplications and additions on allowed pairs: `4 * B * H * D * pairs`, and 2.5 x that for a backward pass."""
    return 4 * case.batch * case.heads * case.head_dim * pairs * (1 if case.passes == "forward" else 3.5)


def run_case(
    case: Case, entries: Sequence[tuple[str, str]], *, rounds: int, limit: float, memory: bool
) -> list[dict[str, Any]]:
    """Measures contenders, given as `(mask name, contender name)`, against each other; one row for each.

    One that takes over `limit` seconds and `SLOW` times as long as joint attention is called once, without the others.
    """
    torch.compiler.reset()
    device = torch.device(case.device)
    rows = {_label(*entry): _row(case, *entry) for entry in entries}
    calls: dict[str, Callable[[], object]] = {}
    times: dict[str, Times] = {}
    around: dict[str, Callable[[], AbstractContextManager[object]]] = {}
    joint = math.inf
    for mask_name, name in entries:
        label = _label(mask_name, name)
        row = rows[label]
        with failing_into(row):  # a peer may fail in any way, and the others go on
            _refuse_what_does_not_fit(name, case)
            contender = CONTENDERS[name](case, mask_name)
            call = _step(contender, case)
            row["mask_seconds"] = contender.mask_seconds
            around[label] = contender.around
            with contender.around():
                actual, seconds = timed(partial(call, _checked_grad_output(case)), case)
                _check(name, mask_name, case, actual)
                del actual
                # was it an import or a compiler? (Nothing is compiled for the unfused, which may take minutes.)
                if seconds > limit and (seconds < 5 * limit or not _unfused(name, case)):
                    seconds = timed(call, case)[1]
                if name == "joint":
                    joint = seconds
                once = seconds > max(limit, SLOW * joint)
                if memory:
                    row["peak_bytes"] = _peak(name, mask_name, case, call, warm=not once)
            if once:
                times[label] = Times([seconds])
            else:
                calls[label] = until_failure(call, row)
    times |= interleaved(calls, device, rounds=rounds, warmup=1, around=around)
    for mask_name, name in entries:
        if rows[_label(mask_name, name)]["error"] is None:
            _fill(rows[_label(mask_name, name)], mask_name, name, times, case)
    return list(rows.values())


def _label(mask_name: str, name: str) -> str:
    return f"{name} under {mask_name}"


def _row(case: Case, mask_name: str, name: str) -> dict[str, Any]:
    sizes = {key: value for key, value in asdict(case).items() if key not in ("passes", "seed")}
    row = {"mask": mask_name, "contender": name, "pass": case.passes, **sizes}
    empty = (
        "seconds", "spread", "rounds", "density", "useful_flops", "tflops", *(f"over_{peer}" for peer in REFERENCES),
        "ideal", "realised_over_ideal", "peak_bytes", "peak_over_q", "mask_seconds", "error",
    )  # fmt: skip
    return row | dict.fromkeys(empty) | {"note": NOTES.get(name)}


def _unfused(name: str, case: Case) -> bool:
    return name == "kronmask dense" or (name == "kronmask flex" and case.device == "cpu")


def _refuse_what_does_not_fit(name: str, case: Case) -> None:
    """Raises MemoryError if an unfused backend's scores would not fit into memory."""
    if not _unfused(name, case):
        return
    needed = SCORE_COPIES * 4 * case.batch * case.heads * case.length**2
    available = available_memory(torch.device(case.device))
    if needed > available:
        raise MemoryError(f"skipped: would need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} available")


def _peak(name: str, mask_name: str, case: Case, call: Callable[[], object], *, warm: bool) -> int | None:
    device = torch.device(case.device)
    if device.type == "cuda":
        return peak_memory(lambda: call, device=device)
    if not CAN_MEASURE_A_PROCESS:
        return None
    return peak_memory(_prepared_for_memory, name, mask_name, case, warm, device=device)


def _fill(row: dict[str, Any], mask_name: str, name: str, times: Mapping[str, Times], case: Case) -> None:
    """Completes the row of a contender that ran."""
    own, length = times[_label(mask_name, name)], case.length
    if name == "divided":
        pairs = length * (case.frames + case.tokens)
    else:
        pairs = masks.NAMES[mask_name](case.frames, case.tokens).num_pairs
    flops = useful_flops(case, pairs)
    row |= {"seconds": own.median, "spread": own.spread, "rounds": len(own.seconds), "density": pairs / length**2}
    row |= {"useful_flops": flops, "tflops": flops / own.median / 1e12, "ideal": row["density"]}
    for peer in REFERENCES:
        other = times.get(_label(MASK_FREE.get(peer, mask_name), peer))
        if other is not None:
            paired = len(own.seconds) == len(other.seconds)
            row[f"over_{peer}"] = own.over(other) if paired else own.median / other.median
    if row["over_joint"] is not None:
        row["realised_over_ideal"] = row["ideal"] / row["over_joint"]
    if row["peak_bytes"] is not None and case.passes == "forward":
        row["peak_over_q"] = (row["peak_bytes"] - case.tensor_bytes) / case.tensor_bytes


# ---- the command ----------------------------------------------------------------------------------------------------


def _peaks(dtype: str, device: torch.device) -> dict[str, float]:
    """What the machine gives at best: TFLOP/s of a matrix multiplication, TB/s of a copy (read and written bytes)."""
    size, count = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, rounds=5)
    matmul, copy = (min(times[name].seconds) for name in ("matmul", "copy"))
    return {"tflops": 2 * size**3 / matmul / 1e12, "terabytes_per_second": 2 * count / copy / 1e12}


def _show(case: Case, rows: Sequence[Mapping[str, Any]]) -> None:
    def number(value: float | None, form: str, factor: float = 1) -> str:
        return "" if value is None else format(value * factor, form)

    def title(row: Mapping[str, Any]) -> str:
        return ", ".join(dict.fromkeys((row["mask"], row["contender"])))

    columns = (
        "mask, contender", "ms", "spread", "over joint", "ideal", "realised / ideal", "over sdpa_mask", "over flex_128",
        "TFLOP/s", "peak MiB", "mask ms",
    )  # fmt: skip
    cells = [
        (
            title(row),
            number(row["seconds"], ".2f", 1000),
            "once" if row["rounds"] == 1 else number(row["spread"], ".0%"),
            number(row["over_joint"], ".3f"),
            number(row["ideal"], ".3f"),
            number(row["realised_over_ideal"], ".2f"),
            number(row["over_sdpa_mask"], ".2f"),
            number(row["over_flex_128"], ".2f"),
            number(row["tflops"], ".3g"),
            number(row["peak_bytes"], ".1f", 2**-20),
            number(row["mask_seconds"], ".1f", 1000),
        )
        for row in rows
        if row["error"] is None
    ]
    sizes = f"T={case.frames} N={case.tokens} B={case.batch} H={case.heads} D={case.head_dim}"
    table(f"{sizes} {case.dtype} {case.device}, {case.passes}", columns, cells)
    failed = [(title(row), textwrap.shorten(row["error"], 125, placeholder=" ...")) for row in rows if row["error"]]
    if failed:
        table("", ("not measured", "because"), failed)


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; what was not given is filled in for the machine, and `shapes` are its pairs of frames and tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number = parser.add_argument, _at_least_one
    add("--masks", nargs="+", choices=masks.NAMES, default=["kmt", "kmct"])
    add("--backends", nargs="*", choices=BACKENDS, help="of kronmask")
    add("--peers", nargs="*", choices=PEERS)
    add("--frames", nargs="+", type=number, metavar="T", help="with --tokens: every pair of both is measured")
    add("--tokens", nargs="+", type=number, metavar="N", help="per frame, the class token included")
    add("--batch", nargs="+", type=number, metavar="B")
    add("--heads", nargs="+", type=number, metavar="H", default=[12])
    add("--head-dim", nargs="+", type=number, metavar="D", default=[64])
    add("--dtype", nargs="+", choices=TOLERANCE)
    add("--device", type=torch.device, default=default_device())
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    add("--rounds", type=number)
    add(
        "--limit",
        type=float,
        default=LIMIT,
        help=f"seconds over which one {SLOW:.0f} x slower than joint is timed once",
    )
    add("--threads", type=number, help="of torch on the CPU")
    add("--seed", type=int, default=0)
    add("--out", type=Path)
    add("--name", default="attn_speed", help="of the files in --out")
    add("--quick", action="store_true", help="two shapes; two minutes on two cores")
    add("--no-memory", dest="memory", action="store_false")
    add("--no-plots", dest="plots", action="store_false")
    options = parser.parse_args(arguments)
    defaults = (CUDA if options.device.type == "cuda" else CPU) | (QUICK if options.quick else {})
    able = {
        key: [name for name in names if runs_on(options.device, name)]
        for key, names in (("peers", PEERS), ("backends", BACKENDS))
    }
    defaults = {**able, "out": _repository() / "runs/benchmarks" if options.quick else RESULTS} | defaults
    if options.frames or options.tokens:
        defaults["shapes"] = list(product(options.frames or [8], options.tokens or [197]))
    for key, value in defaults.items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    return options


def _repository() -> Path:
    return RESULTS.parents[1]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs the command and returns the rows; they are written after each case, so a run that is stopped leaves those."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    lists = (options.dtype, options.batch, options.heads, options.head_dim, options.passes)
    cases = [
        Case(frames, tokens, batch, heads, head_dim, dtype, str(options.device), passes, options.seed)
        for dtype, batch, heads, head_dim, passes in product(*lists)
        for frames, tokens in options.shapes
    ]
    entries = [(MASK_FREE[name], name) for name in options.peers if name in MASK_FREE]
    for mask_name in options.masks:
        entries += [(mask_name, f"kronmask {backend}") for backend in options.backends]
        entries += [(mask_name, name) for name in options.peers if name not in MASK_FREE]

    peaks = {dtype: _peaks(dtype, options.device) for dtype in options.dtype}
    rows: list[dict[str, Any]] = []
    for case in tqdm(sorted(cases, key=lambda case: case.length), unit="case", disable=None):
        measured = run_case(case, entries, rounds=options.rounds, limit=options.limit, memory=options.memory)
        rows += measured
        path = save(options.name, rows, options.out, peaks=peaks)
        _show(case, measured)
    pictures = draw(rows, peaks, options.out, options.name) if options.plots else []
    print("written:", *(path.name for path in (path, path.with_suffix(".csv"), *pictures)), f"in {options.out}")
    return rows


if __name__ == "__main__":
    main()
