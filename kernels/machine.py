"""What machine code asks of a GPU: its loops, the work of each pipe in them, and how many blocks share a multiprocessor (SM).

A model, not a measurement: instructions are counted by the pipe that executes them and divided by what that pipe does in a cycle.
Latency, bank conflicts, cache misses and clocks are left out. Sources of the constants:

- dense bfloat16 flop a cycle an SM: peak of the data sheet / (SMs x boost clock). A100 312 TFLOP/s / (108 x 1.41 GHz) = 2048,
  H100 SXM 989 / (132 x 1.83 GHz) = 4096, B200 2250 / (148 x 1.85 GHz) = 8192; one multiply-add counts as two.
- lanes a cycle an SM: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": float32 add and multiply-add
  64 (8.0) or 128 (9.0, 10.0); integer, logic, compare, minimum, integer multiply-add 64; exp2 16; warp shuffle 32. Which
  instruction goes where: Nsight Compute, "Pipelines" (the ALU also packs float32 to 16 bits).
- shared memory: 128 bytes a cycle an SM, which matrix instructions that read operands there share (Programming Guide; for wgmma
  of fewer than 64 columns Luo et al. 2024, arXiv 2402.13499; for tcgen05 Zadouri et al. 2026, FlashAttention-4). Whether shuffles
  keep operands waiting is not published; here they do not. Spilled registers pass through the same unit, the L1 cache.
- L2: 5120 bytes a cycle for all SMs (A100 white paper), taken to hold for H100 too and twice that for the two dies of B200, but
  at most 64 an SM.
- registers, shared memory, threads and blocks of an SM: Programming Guide, table of compute capabilities.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

__all__ = [
    "GPUS",
    "MATRIX",
    "PIPES",
    "Gpu",
    "Work",
    "blocks_per_sm",
    "is_instruction",
    "matrix_loops",
    "other_loops",
    "partitions",
    "work",
]

PIPES = ("tensor", "exp2", "fp32", "integer", "shared", "shuffle", "l2", "issue")


@dataclass(frozen=True)
class Gpu:
    """What one SM does in a cycle, and what its blocks share."""

    flop: int
    fp32: int
    l2: float
    shared_bytes: int
    exp2: int = 16
    integer: int = 64
    shuffle: int = 32
    shared: int = 128
    issue: int = 4
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    tensor_columns: int = 512  # of tensor memory, where there is one


GPUS = {
    "sm_80": Gpu(flop=2048, fp32=64, l2=5120 / 108, shared_bytes=164 * 1024),
    "sm_90": Gpu(flop=4096, fp32=128, l2=5120 / 132, shared_bytes=228 * 1024),
    "sm_100": Gpu(flop=8192, fp32=128, l2=64, shared_bytes=228 * 1024),
}


@dataclass(frozen=True)
class Work:
    """Cycles of an SM that a stretch of code keeps each of PIPES busy, for one block of threads.

    Attributes:
        ideal: cycles of the tensor pipe if its instructions ran at the full rate.
        instructions: issued by each warp; of several partitions the sum.
        counts: of these, by the pipe that executes them; and "stack", those that read or write spilled registers.
        shapes: how often each matrix instruction stands in the code, such as "64x64x16 shared" (where its first operand lies).
    """

    cycles: dict[str, float]
    ideal: float
    instructions: int
    counts: dict[str, int]
    shapes: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        """Of both, as partitions of a kernel that work on one turn: each pipe serves all warps of an SM."""
        cycles = {pipe: own + other.cycles[pipe] for pipe, own in self.cycles.items()}
        counts, shapes = Counter(self.counts) + Counter(other.counts), Counter(self.shapes) + Counter(other.shapes)
        ideal, instructions = self.ideal + other.ideal, self.instructions + other.instructions
        return Work(cycles, ideal, instructions, dict(counts), dict(shapes))

    @property
    def overlapped(self) -> float:
        """Cycles if all pipes work at once: those of the busiest."""
        return max(self.cycles.values())

    @property
    def rest(self) -> float:
        """Cycles of all but the matrix products, overlapped among themselves."""
        return max(cycles for pipe, cycles in self.cycles.items() if pipe not in ("tensor", "l2", "shared"))

    @property
    def in_turn(self) -> float:
        """Cycles if matrix products and all else take turns, as they do in one block of threads that waits for each product."""
        return max(self.overlapped, self.cycles["tensor"] + self.rest)

    def without(self, other: Work, times: int) -> Work:
        """This work less that of code which it repeats so many times."""
        cycles = {pipe: max(0.0, own - times * other.cycles[pipe]) for pipe, own in self.cycles.items()}
        return replace(self, cycles=cycles, ideal=max(0.0, self.ideal - times * other.ideal))

    def estimated(self, streams: int) -> float:
        """Cycles if so many blocks (or warp groups that run apart) take turns: the shorter part hides behind the longer.

        `longer + shorter / streams` is `in_turn` for one stream and, where both parts are equal, the throughput of a closed
        queue of two stations.
        """
        longer, shorter = sorted((self.cycles["tensor"], self.rest), reverse=True)
        return max(self.overlapped, longer + shorter / streams)


def blocks_per_sm(gpu: Gpu, registers: int, warps: int, shared_bytes: int, tensor_columns: int = 0) -> int:
    """How many blocks an SM holds; registers go to a warp by 256, and a block takes 1 KiB of shared memory for itself."""
    by_warp = -(-registers * 32 // 256) * 256
    limits = [gpu.registers // (by_warp * warps), gpu.threads // (32 * warps), gpu.blocks]
    limits.append(gpu.shared_bytes // (shared_bytes + 1024))
    if tensor_columns:
        limits.append(gpu.tensor_columns // tensor_columns)
    return min(limits)


# ---- loops ----------------------------------------------------------------------------------------------------------

# Machine instructions that stand for each kind of matrix instruction, the newest kind first.
MATRIX = {"tcgen05": r"UTC\w*MMA", "wgmma": r"[HQI]GMMA", "mma": r"[HIQ]MMA", "mfma": r"v_mfma"}


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """`[first, last)` of each loop, from the target of a backward branch to the branch.

    Waits that were moved behind the end of the code branch back too, over an exit, and are no loops.
    """
    at = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    spans = []
    for i, line in enumerate(lines):
        branch = re.search(r"(?:^|\s)(?:BRA\S*|s_c?branch\S*)\s.*?(\.L\w+)", line)
        if branch and at.get(branch[1], i) < i:
            start = at[branch[1]]
            if not any(re.match(r"(EXIT|s_endpgm)\b", other) for other in lines[start:i]):
                spans.append((start, i + 1))
    return spans


def _innermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted(s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans))


def matrix_loops(lines: list[str]) -> list[list[str]]:
    """The innermost loops that multiply matrices, in the order of the code."""
    return [lines[slice(*s)] for s in _innermost([s for s in _loops(lines) if _multiplies(lines[slice(*s)])])]


def other_loops(lines: list[str]) -> tuple[list[list[str]], list[str]]:
    """The innermost loops without matrix products (that over diagonals), and the code in no loop.

    The latter is without the copies that a pipelined loop starts ahead: as many of its last turns copy nothing.
    """
    spans = _loops(lines)
    multiplying = _innermost([s for s in spans if _multiplies(lines[slice(*s)])])
    plain = [
        s for s in _innermost(spans) if not _multiplies(lines[slice(*s)]) and s[1] - s[0] > 32
    ]  # waits are shorter
    inside = [*multiplying, *plain]
    outside = [line for i, line in enumerate(lines) if not any(first <= i < last for first, last in inside)]
    outside = [line for line in outside if not is_instruction(line, "LDGSTS|UTMALDG")]
    return [lines[slice(*s)] for s in plain], outside


def partitions(lines: list[str], number: int) -> list[list[str]]:
    """The code of a warp-specialised kernel: that of its first warps, which run all of it, and of each of `number` partitions.

    The other warps wait at an indirect branch, whose targets are the partitions in order and then what ends the waiting.
    """
    targets = [re.findall(r"\.L_\w+", line) for line in lines if line.startswith("BRX")]
    if len(targets) != 1 or len(targets[0]) < number:
        raise ValueError(f"{len(targets)} indirect branches, not one with {number} partitions among its targets")
    starts = [lines.index(target + ":") for target in targets[0]]
    spans = [(start, min([other for other in starts if other > start], default=len(lines))) for start in starts]
    own = [slice(*span) for span in spans[:number]]
    first = [line for i, line in enumerate(lines) if not any(s.start <= i < s.stop for s in own)]
    return [first, *(lines[s] for s in own)]


def _multiplies(lines: list[str]) -> bool:
    return any(is_instruction(line, "|".join(MATRIX.values())) for line in lines)


def is_instruction(line: str, pattern: str) -> bool:
    """Whether a line's instruction, behind its predicate, begins as the pattern says."""
    return re.match(rf"(?:@!?U?P\w+\s+)?(?:{pattern})", line) is not None


# ---- work -----------------------------------------------------------------------------------------------------------

# Which pipe executes an instruction, by the beginning of its name; what is in none of them (uniform registers, branches,
# barriers) is issued, and that is all.
EXECUTED_BY = {
    "exp2": r"(MUFU|I2F|F2I|I2I|F2F|POPC|FLO|BREV)\b",
    "fp32": r"(FADD|FMUL|FFMA|HFMA2|HADD2|HMUL2|IMAD)",
    "integer": r"(IADD|[IF]SETP|LOP|F?SEL\b|[FI]MNMX|V[IH]MNMX|VIADD|SHF\b|LEA|PRMT|[FI]2FP|PLOP|IABS|SGXT|BMSK|P2R|R2P|MOV)",
    "shared": r"(LDS|STS|LDSM|STSM|LDL|STL)\b",
    "shuffle": r"SHFL\b",
    "l2": r"(LDGSTS|UTMALDG|LDG|STG|LD|ST|RED|ATOM)\b",
}


@dataclass(frozen=True)
class Product:
    """A matrix instruction of 16-bit operands: who issues it, and whether it reads its first operand from shared memory."""

    rows: int
    columns: int
    depth: int
    issuer: str  # "warp", "group" (of four warps) or "block"
    reads_first: bool

    @property
    def shape(self) -> str:
        place = {"warp": "", "group": "registers", "block": "tensor memory"}[self.issuer]
        return f"{self.rows}x{self.columns}x{self.depth} {'shared' if self.reads_first else place}".strip()

    @property
    def shared_bytes(self) -> int:
        """What it reads from shared memory; a warp's operands come through registers."""
        if self.issuer == "warp":
            return 0
        return 2 * self.depth * (self.columns + (self.rows if self.reads_first else 0))

    def cycles(self, gpu: Gpu) -> tuple[float, float]:
        """At the full rate, and with what bounds it: operands in shared memory; tcgen05's 64 rows take as long as 128."""
        full = 2 * self.rows * self.columns * self.depth / gpu.flop
        half_empty = self.issuer == "block" and self.rows < 128
        return full, max(full * (128 / self.rows if half_empty else 1), self.shared_bytes / gpu.shared)


def work(lines: list[str], gpu: Gpu, warps: int, box_bytes: int = 0, boxes: int = 1) -> Work:
    """What code (SASS) asks of the pipes when each warp of a block runs it once.

    `box_bytes` is what one tensor-memory-accelerator copy moves, which its instruction does not say. Of a block of several
    `boxes` each warp copies another one by the same instruction.
    """
    cycles = dict.fromkeys(PIPES, 0.0)
    counts: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    ideal = 0.0
    constants: dict[str, int] = {}  # in uniform registers: among them those that describe matrix instructions
    for line in lines:
        if line.endswith(":"):
            continue
        counts["issue"] += 1
        cycles["issue"] += warps / gpu.issue
        if line.startswith("@!PT "):  # never executed: a fence
            continue
        text = re.sub(r"^@!?U?P\w+\s+", "", line)
        name = text.split()[0]
        if constant := re.match(r"UMOV (UR\d+), (0x[0-9a-f]+)$", text):
            constants[constant[1]] = int(constant[2], 16)
        if product := _product(text, constants):
            often = {"warp": warps, "group": warps / 4, "block": 1}[product.issuer]
            full, bound = product.cycles(gpu)
            ideal += often * full
            cycles["tensor"] += often * bound
            cycles["shared"] += often * product.shared_bytes / gpu.shared
            shapes[product.shape] += 1
            counts["tensor"] += 1
            continue
        pipe = next((pipe for pipe, names in EXECUTED_BY.items() if re.match(names, name)), None)
        if pipe is None:
            continue
        counts[pipe] += 1
        counts["stack"] += name.startswith(("LDL", "STL"))
        if pipe in ("shared", "l2"):
            moved = box_bytes * min(boxes, warps) if name.startswith("UTMALDG") else warps * 32 * _bytes(name)
            is_copy = name.startswith(("UTMALDG", "LDGSTS"))
            if pipe == "shared" or is_copy:
                cycles["shared"] += moved / gpu.shared
            if pipe == "l2" and (
                _bytes(name) == 16 or name.startswith("UTM")
            ):  # narrower: small tables, which lie in L1
                cycles["l2"] += moved / gpu.l2
        else:
            values = 2 if re.match(r"(FADD|FMUL|FFMA)2", name) else 1  # two in one instruction of a lane
            rate = gpu.integer if name.startswith("IMAD") else getattr(gpu, pipe)
            cycles[pipe] += warps * 32 * values / rate
    instructions = counts.pop("issue", 0)
    return Work(cycles, ideal, instructions, dict(+counts), dict(shapes))


def _product(text: str, constants: dict[str, int]) -> Product | None:
    if found := re.match(r"HMMA\.(16)(8)(8|16)\.", text):
        return Product(int(found[1]), int(found[2]), int(found[3]), "warp", False)
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.\S* \S+, (gdesc)?", text):
        return Product(int(found[1]), int(found[2]), int(found[3]), "group", bool(found[4]))
    if found := re.match(r"UTCHMMA\S* (gdesc|tmem).*?idesc\[(UR\d+)\]", text):
        described = constants[
            found[2]
        ]  # columns / 8 from bit 17 on, rows / 16 from bit 24 on (PTX ISA, instruction descriptor)
        return Product((described >> 24 & 0x1F) * 16, (described >> 17 & 0x3F) * 8, 16, "block", found[1] == "gdesc")
    return None


def _bytes(name: str) -> int:
    """Bytes a lane of a load or store; of matrices of 8 x 8, four for each."""
    if matrices := re.search(r"88(?:\.([24]))?$", name):
        return 4 * int(matrices[1] or 1)
    found = re.search(r"\.(U8|S8|U16|S16|64|128)\b", name)
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[found[1]] if found else 4
