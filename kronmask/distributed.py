"""The frames of a clip on many ranks: `frame_parallel(model, mesh["frames"])`.

Each of the R ranks of the frame dimension holds t = T/R frames of each clip. Everything but temporal attention runs on them
alone. In a temporal layer a rank starts to gather the keys and values of the other ranks, meanwhile lets its own frames attend
to each other, then lets them attend to the others, and merges the two by their log-sum-exp: the merge of ring attention (Liu et
al. 2023, arXiv 2310.01889) with the gather of Llama 3's context parallelism (arXiv 2407.21783). The mask of a rank is rows of
the whole one.

**What a rank sends.** A temporal layer, of clips of N tokens a frame and W channels of keys, receives and sends (R - 1) times
`2 * B * t * N * W * itemsize` bytes in the forward, its keys and values, and as much again in the backward, their gradients. A
forward sends besides 9 int64 numbers (its header) and, for each averaged output, the bytes of that output.

**What a rank holds.** The activations of image blocks, and all of a temporal layer but keys and values, are 1/R of those of one
process. For its backward, attention keeps keys and values of all T frames, `2 * B * T * N * W * itemsize` bytes for a layer;
while a layer runs, the gathered copy is as large again. The merge adds the output of the second attention and its own, `2 * B *
t * N * W * itemsize` bytes, in low precision twice as much again in float32. Activation checkpointing keeps none of it, and
gathers once more.

**Who sums, who averages.** A collective's backward is its adjoint: gradients of the gathered keys and values are summed over
the ranks onto the rank that they came from, and those of the mean over frames are summed over the ranks. So `backward()` of
every rank's loss together leaves on each rank the derivative, by its own copy of the parameters, of the *sum* of all ranks'
losses. Averaged over all ranks, which `DistributedDataParallel` and `fully_shard` do when their mesh is of all ranks, frame
ranks included, that is the gradient of the *mean* of the ranks' losses: of the one loss, where all ranks compute it from the
output for each clip; of the mean over all frames, where each computes the mean over its own. The same holds on a mesh (batch,
frames): average over both. Without a wrapper, average `p.grad` over all ranks oneself. Never average over the batch dimension
alone: the gradient is then a part, times R.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from kronmask.attention import kron_attention
from kronmask.clips import Clips
from kronmask.mask import KronMask
from kronmask.nn import MaskRule, TemporalEmbedding
from kronmask.patch.video import VideoEncoder

__all__ = ["FrameGroup", "ParallelClips", "deal", "frame_parallel", "own_frames", "shard_frames"]

Model = TypeVar("Model", bound=nn.Module)

# as recent releases of torch call them; before, by their names of torch 1
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ---- what a user calls ----------------------------------------------------------------------------------------------


def frame_parallel(model: Model, mesh: DeviceMesh | None, *, causal: bool | None = None) -> Model:
    """Let each rank of `mesh` hold some of the frames of each clip, in place: `model(shard_frames(video, model))`.

    All ranks of `mesh` call the model together, with equal shapes, and `backward()` together. Outputs for clips (the mean over
    frames) are those of whole clips, the same on every rank; outputs for frames, `forward_frames` and `forward_tokens` are of
    the rank's own frames. Wrap the model in `DistributedDataParallel` or `fully_shard` over *all* ranks, before or after; they
    then learn what one process does (who sums and who averages is said at the top of this module). Dropout and stochastic depth
    draw for each frame: seed each rank differently. A copy of the model is parallel in the same way; a file holds its
    `state_dict`, which is as before.

    Args:
        model: patched by `patch_vit`, or a wrapper around such a model.
        mesh: the frame dimension of a device mesh: `mesh["frames"]`, or a mesh of one dimension. None turns it off.
        causal: which frames a rank holds, see `deal`: True balances the work of causal masks. By default it is found from the
            table of the model's mask. Outputs do not depend on it.

    Returns:
        The same object.

    Raises:
        TypeError: `mesh` is no `DeviceMesh`.
        ValueError: the model is not patched; the mesh has more than one dimension or does not contain this rank; or a mask that
            is a function does not take the small size at which it is asked whether it is causal.

    The model raises on every rank: ValueError where shapes differ between ranks or frames cannot be dealt to them, and in
    training with patch dropout (each rank would drop other patches); RuntimeError, within the timeout of the process group, where
    a rank has died or does not call it.
    """
    encoders = _encoders(model)
    groups: list[FrameGroup | None] = [None] * len(encoders)
    if mesh is not None:
        _check_mesh(mesh)
        groups = [FrameGroup(mesh, _is_causal(e, mesh.size()) if causal is None else causal) for e in encoders]
    for encoder, group in zip(encoders, groups, strict=True):
        encoder.temporal_encoder.frame_group = group
    return model


def deal(frames: int, ranks: int, *, causal: bool = False) -> list[list[int]]:
    """The numbers of the frames that each rank holds, ascending: equally many, and of equal work.

    Rank r holds the r-th of R chunks. Under a causal mask later frames see more, so rank r then holds two of 2R chunks, the r-th
    from the front and the r-th from the back (zigzag, as Llama 3's context parallelism, arXiv 2407.21783).

    Raises:
        ValueError: `frames` is no multiple of `ranks`, or of `2 * ranks` if `causal`.
    """
    zigzag = causal and ranks > 1
    parts = 2 * ranks if zigzag else ranks
    if frames < 1 or frames % parts:
        way = "; frame_parallel(..., causal=False) deals any multiple of the ranks, to unequal work" if zigzag else ""
        raise ValueError(
            f"{frames} frames cannot be dealt to {ranks} ranks{' in zigzag' if zigzag else ''}: they must be a multiple of "
            f"{parts}{way}"
        )
    size = frames // parts
    chunks = [list(range(i * size, (i + 1) * size)) for i in range(parts)]
    return [chunks[r] + chunks[-1 - r] for r in range(ranks)] if zigzag else chunks


def own_frames(model: nn.Module, frames: int) -> list[int]:
    """The numbers of the frames that this rank holds of a clip of `frames` frames, ascending.

    Raises:
        ValueError: the model is not frame-parallel, or `frames` cannot be dealt to the ranks.
    """
    group = next((encoder.temporal_encoder.frame_group for encoder in _encoders(model)), None)
    if group is None:
        raise ValueError(f"this {type(model).__name__} is not frame-parallel; call frame_parallel(model, mesh) first")
    return group.deal(frames)[group.rank]


def shard_frames(video: Tensor, model: nn.Module) -> Tensor:
    """This rank's frames `(B, T/R, ...)` of whole clips `(B, T, ...)`: what a frame-parallel `model` takes.

    Raises:
        ValueError: the model is not frame-parallel, or T cannot be dealt to the ranks.
    """
    return video[:, own_frames(model, video.shape[1])]


def _encoders(model: nn.Module) -> list[VideoEncoder]:
    encoders = [module for module in model.modules() if isinstance(module, VideoEncoder)]
    if not encoders:
        raise ValueError(f"this {type(model).__name__} is not patched; call patch_vit(model) first")
    return encoders


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh or None, not {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, that of the frames, not the {mesh.ndim} {mesh.mesh_dim_names or ''}; pass "
            'mesh["frames"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not in the mesh {mesh}")


def _is_causal(encoder: VideoEncoder, ranks: int) -> bool:
    """Whether no frame sees a later one, by the tables of the masks of an encoder."""
    return all(_no_later(rule, 2 * ranks) for rule in encoder.temporal_encoder.masks())


def _no_later(rule: MaskRule, frames: int) -> bool:
    tokens = 5  # a grid of 2 x 2 patches and a class token
    if isinstance(rule.attention, KronMask):
        frames, tokens = rule.attention.num_frames, rule.attention.num_tokens
    try:
        text = rule(frames, tokens)
    except Exception as error:
        raise ValueError(
            f"the mask {rule!r} could not be asked at {frames} frames of {tokens} tokens whether it is causal ({error}); say "
            "frame_parallel(..., causal=True) or causal=False"
        ) from error
    return KronMask.from_rule(text, frames=(frames, frames), tokens=(tokens, tokens)).looks_ahead is None


# ---- the ranks ------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.int64)
_DIMS = 6


class FrameGroup:
    """The ranks that share the frames of a clip; `frame_parallel` makes it.

    A copy of a model is parallel over the same ranks. A file cannot hold it, since other processes will read it.
    """

    def __init__(self, mesh: DeviceMesh, causal: bool) -> None:
        self.group = mesh.get_group()
        self.ranks = mesh.size()
        self.rank = dist.get_rank(self.group)
        self.causal = causal
        cpu = torch.device("cpu")  # its backend, if the group has one, checks shapes without waiting for a GPU
        self.header_device = cpu if cpu in self.group._device_types else torch.device(mesh.device_type)

    def deal(self, frames: int) -> list[list[int]]:
        """The numbers of the frames that each rank holds."""
        return deal(frames, self.ranks, causal=self.causal)

    def clips(self, frames: int) -> ParallelClips:
        """The clips of which this rank has `frames` frames."""
        return ParallelClips(frames, self)

    @torch.compiler.disable
    def check(self, images: Any) -> None:
        """Raises on every rank unless all have inputs of one shape and dtype, and all or none record gradients.

        One gather of 9 numbers in each forward: a rank that has met its shape before cannot know that another has a new one. It
        goes through the CPU if the group has a backend there, as after `init_process_group("cpu:gloo,cuda:nccl")`; else each
        forward waits once for its GPU.

        Raises:
            ValueError: they do not agree.
            RuntimeError: a rank has died, or has not called the model within the timeout of its process group.
        """
        header = torch.tensor(_header(images), device=self.header_device)
        gathered = header.new_empty(self.ranks, len(header))
        with self.hearing():
            all_gather(gathered.view(-1), header, group=self.group)
        headers = gathered.tolist()
        if any(other != headers[0] for other in headers):
            each = "; ".join(f"rank {rank} has {_described(header)}" for rank, header in enumerate(headers))
            raise ValueError(
                f"all {self.ranks} ranks that share the frames of a clip must call the model with inputs of one shape: {each}"
            )

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Says what a collective in the block means when it fails."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of the {self.ranks} that share the frames of a clip has not heard from all others: one has "
                f"died, raised an error, or has not called the model ({error})"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> FrameGroup:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a frame-parallel model cannot be pickled, since its ranks are processes of this run: save its state_dict(), or call "
            "frame_parallel(model, None) first"
        )


def _header(images: Any) -> list[int]:
    """What all ranks must agree on: `[grad, dtype, dimensions, *sizes]`, 9 numbers."""
    if not isinstance(images, Tensor):
        return [int(torch.is_grad_enabled()), -1, 0] + [0] * _DIMS
    dtype = _DTYPES.index(images.dtype) if images.dtype in _DTYPES else len(_DTYPES)
    sizes = [*images.shape, *[0] * _DIMS][:_DIMS]
    return [int(torch.is_grad_enabled()), dtype, images.ndim, *sizes]


def _described(header: list[int]) -> str:
    grad, dtype, ndim, *sizes = header
    if dtype == -1:
        return "no tensor"
    name = str(_DTYPES[dtype]).removeprefix("torch.") if dtype < len(_DTYPES) else "another dtype"
    return f"{tuple(sizes[:ndim])} {name}{'' if grad else ' without gradients'}"


# ---- their clips ----------------------------------------------------------------------------------------------------


class ParallelClips(Clips):
    """Clips of `R * frames` frames, of which this rank has `frames`.

    Args:
        frames: frames t of each clip on this rank, as many as on every other.
        group: the ranks.

    Raises:
        ValueError: `R * frames` frames cannot be dealt to the ranks.
    """

    whole = False
    takes_groups = False

    def __init__(self, frames: int, group: FrameGroup) -> None:
        super().__init__(frames)
        self.group = group
        self.own = group.deal(group.ranks * frames)[group.rank]

    def times(self, device: torch.device) -> Tensor:
        """The number in its clip of each of this rank's frames, `(t,)` int64."""
        return torch.tensor(self.own, device=device)

    def embedding(self, embedding: TemporalEmbedding) -> Tensor:
        """The temporal embedding of each of this rank's frames, `(1, t, 1, D)`."""
        return embedding.at(self.group.ranks * self.frames)[:, self.own]

    @torch.compiler.disable
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskRule,
        tokens: int,
        *,
        prefix: int = 0,
        scale: float | None = None,
    ) -> Tensor:
        """Attention `(B, H, t*N, D)` of this rank's frames to those of all ranks that the mask allows."""
        if prefix:
            raise ValueError(f"tokens before the frames (prefix={prefix}) belong to no rank of a frame-parallel model")
        group = self.group
        if group.ranks == 1:
            return super().attend(query, key, value, mask, tokens, scale=scale)
        share = _share(
            mask(group.ranks * self.frames, tokens), self.frames, tokens, group.ranks, group.rank, group.causal
        )
        gather = _Gather(group, share.runs, tokens)
        pending = _Start.apply(key, value, gather)
        own, own_lse = kron_attention(query, key, value, share.own, scale=scale, return_lse=True)
        other_key, other_value = _Finish.apply(pending, gather)
        other, other_lse = kron_attention(query, other_key, other_value, share.others, scale=scale, return_lse=True)
        return merge(own, own_lse, other, other_lse)

    @torch.compiler.disable
    def mean(self, value: Tensor) -> Tensor:
        """`(B*t, ...)`, a row for each of this rank's frames, to `(B, ...)`: the mean over the frames of all ranks."""
        local = super().mean(value.to(torch.promote_types(value.dtype, torch.float32)))
        return _Sum.apply(local / self.group.ranks, self.group).to(value.dtype)


@dataclass(frozen=True)
class _Share:
    """What one rank has of a mask."""

    own: KronMask  # its frames against its frames
    others: KronMask  # its frames against all others, in the order of the clip
    runs: tuple[tuple[int, int, int], ...]  # where these are: (rank, first, end) of its frames there


@lru_cache(maxsize=256)
def _share(rule: str, frames: int, tokens: int, ranks: int, rank: int, causal: bool) -> _Share:
    total = ranks * frames
    mask = KronMask.from_rule(rule, frames=(total, total), tokens=(tokens, tokens))
    dealt = deal(total, ranks, causal=causal)
    place = {frame: (r, i) for r, own in enumerate(dealt) for i, frame in enumerate(own) if r != rank}
    runs: list[tuple[int, int, int]] = []
    for r, i in (place[frame] for frame in sorted(place)):
        if runs and runs[-1][0] == r and runs[-1][2] == i:
            runs[-1] = (r, runs[-1][1], i + 1)
        else:
            runs.append((r, i, i + 1))
    own, others = mask.select(query=dealt[rank], key=dealt[rank]), mask.select(query=dealt[rank], key=sorted(place))
    return _Share(own, others, tuple(runs))


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Attention to two disjoint sets of keys as attention to both: outputs `(B, H, L, D)`, LSE `(B, H, L)`.

    The weight of the other part is `sigmoid(other_lse - lse)`. Queries that see no key of one part or of both (LSE -inf, output
    0) have finite gradients.
    """
    low = torch.finfo(lse.dtype).min / 4  # instead of -inf: the difference of two is 0, not NaN
    difference = other_lse.masked_fill(other_lse.isneginf(), low) - lse.masked_fill(lse.isneginf(), low)
    weight = difference.sigmoid().unsqueeze(-1)
    return torch.lerp(output.to(weight.dtype), other.to(weight.dtype), weight).to(output.dtype)


# ---- collectives with autograd --------------------------------------------------------------------------------------
# The gather is two nodes of the graph, a start and an end, around the attention of the own frames: it hides behind that in the
# forward and, since the backward runs nodes in reverse, the sum of gradients hides behind its backward. Ranks that see nothing
# of the others still have all nodes, so that all ranks call the same collectives in the same order.


class _Gather:
    """Keys and values of the other ranks, on their way; then gradients, on their way back."""

    def __init__(self, group: FrameGroup, runs: tuple[tuple[int, int, int], ...], tokens: int) -> None:
        self.group = group
        self.runs = [(rank, slice(first * tokens, end * tokens)) for rank, first, end in runs]
        self.work: Any = None
        self.sent = self.received = torch.empty(0)

    def wait(self) -> Tensor:
        """What has been received; kept no longer here."""
        with self.group.hearing():
            self.work.wait()
        received, self.work, self.sent, self.received = self.received, None, torch.empty(0), torch.empty(0)
        return received


class _Start(torch.autograd.Function):
    """Start to gather keys and values `(B, H, t*N, D)`; in the backward, the end of the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, gather: _Gather) -> Tensor:  # type: ignore[override]
        ctx.gather = gather
        gather.sent = torch.stack([key, value])
        gather.received = key.new_empty(gather.group.ranks, *gather.sent.shape)
        gather.work = all_gather(gather.received.flatten(0, 1), gather.sent, group=gather.group.group, async_op=True)
        return key.new_zeros(())  # ties the end to the start

    @staticmethod
    def backward(ctx: Any, pending: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        key, value = ctx.gather.wait()
        return key, value, None


class _Finish(torch.autograd.Function):
    """Keys and values of the other ranks' frames, in the order of the clip; in the backward, start to sum their gradients."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor, gather: _Gather) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        received = gather.wait()  # (R, 2, B, H, t*N, D)
        ctx.gather, ctx.shape = gather, received.shape
        key, value = (torch.cat([received[r, i, :, :, part] for r, part in gather.runs], dim=2) for i in (0, 1))
        return key, value

    @staticmethod
    def backward(ctx: Any, key: Tensor, value: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gather = ctx.gather
        gather.sent = key.new_zeros(ctx.shape)  # nothing for this rank's own frames
        sizes = [part.stop - part.start for _, part in gather.runs]
        for i, gradient in enumerate((key, value)):
            for (r, part), piece in zip(gather.runs, gradient.split(sizes, dim=2), strict=True):
                gather.sent[r, i, :, :, part] = piece
        gather.received = key.new_empty(ctx.shape[1:])
        gather.work = reduce_scatter(
            gather.received, gather.sent.flatten(0, 1), group=gather.group.group, async_op=True
        )
        return key.new_zeros(()), None


class _Sum(torch.autograd.Function):
    """The sum over ranks, on each; its backward is the same."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: FrameGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _total(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _total(gradient, ctx.group), None


def _total(value: Tensor, group: FrameGroup) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    with group.hearing():
        dist.all_reduce(total, group=group.group)
    return total
