"""Ranks that share the frames of a clip compute and learn what one process does, and say so when they cannot."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm.models.vision_transformer as vit
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks_of_size
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kronmask import KronMask, distributed, kron_attention, masks, patch_vit, temporal_parameters, unpatch_vit
from kronmask.distributed import deal, frame_parallel, merge, own_frames, shard_frames
from kronmask.nn import KronAttention, TemporalEmbedding
from kronmask.patch.video import VideoBlock

dist = torch.distributed
PLACEMENTS = ("append", "interleave", "replace")
TOKENS, WIDTH, DEPTH = 5, 24, 3
TIMEOUT = timedelta(seconds=60)


def recent(frames: int, tokens: int) -> KronMask:
    """A mask that is a function: the last three frames."""
    return masks.causal(frames, tokens) & masks.frame_window(frames, tokens, radius=2)


def image_model(name: str = "timm", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if name == "timm":
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "num_classes": 5}
        return vit.VisionTransformer(**(sizes | options))
    import transformers

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=5)
    )


def patched(
    attention: Any = "kmt",
    placement: str = "append",
    name: str = "timm",
    image: nn.Module | None = None,
    **options: Any,
) -> Any:
    frames = attention.num_frames if isinstance(attention, KronMask) else 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of masks under which no token sees its frame
        options = {"init": "random", "frames": frames} | options
        return patch_vit(image or image_model(name), attention=attention, placement=placement, **options)


def parallel(model: nn.Module, mesh: DeviceMesh, **options: Any) -> Any:
    return frame_parallel(copy.deepcopy(model), mesh, **options)


def video(frames: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(100 * frames + batch))


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result.logits


def averaged_gradients(model: nn.Module) -> dict[str, Tensor]:
    """What a wrapper would make of the gradients of all ranks."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        dist.all_reduce(parameter.grad)
        found[name] = parameter.grad / dist.get_world_size()
    model.zero_grad()
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def learn(runner: nn.Module, model: nn.Module, single: nn.Module, own: slice, frames: int, scale: float = 1.0) -> None:
    """Two steps of SGD on this rank's part of a batch leave what two steps of `single` on the whole batch leave."""
    whole, single = video(frames, 4), copy.deepcopy(single)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, single)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        actual, expected = output(runner, shard_frames(whole[own], model)), output(single, whole)
        assert_close(actual, expected[own], rtol=0, atol=1e-5)
        (scale * actual.square().mean()).backward()
        expected.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert_close(dict(state), dict(single.state_dict()), rtol=0, atol=1e-5)


# ---- which frames a rank holds --------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_each_frame_is_dealt_to_one_rank(ranks: int, size: int, causal: bool) -> None:
    frames = size * ranks * (2 if causal else 1)
    dealt = deal(frames, ranks, causal=causal)
    assert sorted(itertools.chain(*dealt)) == list(range(frames))
    assert all(own == sorted(own) and len(own) == frames // ranks for own in dealt)


def work(mask: KronMask, dealt: list[list[int]]) -> list[int]:
    return [mask.select(query=own).num_pairs for own in dealt]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("frames", [16, 32])
def test_ranks_have_equal_work(frames: int, ranks: int) -> None:
    for mask in (masks.kmct(frames, TOKENS), masks.causal(frames, TOKENS)):
        zigzag, chunks = (work(mask, deal(frames, ranks, causal=causal)) for causal in (True, False))
        assert max(zigzag) <= 1.05 * min(zigzag)
        assert max(chunks) > 2 * min(chunks)
    for mask in (masks.kmt(frames, TOKENS), masks.joint(frames, TOKENS)):
        pairs = work(mask, deal(frames, ranks))
        assert max(pairs) == min(pairs)
    assert deal(8, 2, causal=True) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert deal(8, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_frames_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="9 frames cannot be dealt to 2 ranks: they must be a multiple of 2$"):
        deal(9, 2)
    with pytest.raises(
        ValueError, match="6 frames cannot be dealt to 2 ranks in zigzag: .* a multiple of 4; .*causal=False"
    ):
        deal(6, 2, causal=True)
    with pytest.raises(ValueError, match="0 frames"):
        deal(0, 2)


def test_models_that_cannot_be_parallel_are_refused() -> None:
    with pytest.raises(ValueError, match="not patched; call patch_vit"):
        frame_parallel(image_model(), None)
    with pytest.raises(TypeError, match="mesh must be a torch.distributed DeviceMesh or None, not str"):
        frame_parallel(patched(), "frames")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not frame-parallel; call frame_parallel"):
        shard_frames(video(), patched())


# ---- two parts of attention -----------------------------------------------------------------------------------------


@given(st.data())
def test_parts_merged_are_attention_to_the_whole_and_nothing_is_nan(data: st.DataObject) -> None:
    frames, tokens = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    mask = data.draw(masks_of_size(data.draw(st.integers(1, 3)), frames, tokens, tokens, 0))
    first = sorted(data.draw(st.sets(st.integers(0, frames - 1), min_size=1, max_size=frames - 1)))
    parts = [first, [k for k in range(frames) if k not in first]]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    sizes = (mask.query_frames, frames, frames)
    inputs = [torch.randn(2, 2, t * tokens, 4, generator=generator, dtype=torch.float64) for t in sizes]

    def run(merged: bool) -> tuple[Tensor, ...]:
        query, key, value = (x.clone().requires_grad_() for x in inputs)
        if merged:
            results: list[Tensor] = []
            for part in parts:
                rows = torch.cat([torch.arange(k * tokens, (k + 1) * tokens) for k in part])
                selected = mask.select(key=part)
                results += kron_attention(
                    query, key[:, :, rows], value[:, :, rows], selected, return_lse=True, backend="dense"
                )
            result = merge(*results)
        else:
            result = kron_attention(query, key, value, mask, backend="dense")
        return result, *torch.autograd.grad(result.sin().sum(), (query, key, value))

    for actual, expected in zip(run(True), run(False), strict=True):
        assert_close(actual, expected)


# ---- on several processes: equal to one -----------------------------------------------------------------------------


def ddp_over_the_frames_learns_what_one_process_learns(mesh: DeviceMesh) -> None:
    ranks = mesh.size()
    torn = KronMask(
        [[(3 * q + 5 * k) % 4 * (q != 5) for k in range(8)] for q in range(8)], [torch.eye(5).flip(0) > 0], tokens=5
    )
    cases = [("append", attention, "timm") for attention in ("kmt", "kmct", "frame_window", recent, torn)]
    cases += [("append", ["kmct", "axial"], "timm")]
    if ranks == 2:
        cases += [("interleave", "joint", "timm"), ("interleave", torn, "timm"), ("replace", recent, "timm")]
        cases += [("replace", ["causal", "joint"], "timm")]
        cases += [(placement, "kmct", "transformers") for placement in PLACEMENTS]
    for number, (placement, attention, name) in enumerate(cases):
        single = patched(attention, placement, name, temporal_embedding="rotary" if number % 2 else True)
        model = parallel(single, mesh)
        learn(DistributedDataParallel(model), model, single, slice(None), 8)
        if attention == "kmct":  # and in longer clips, from where that ended
            learn(DistributedDataParallel(model), model, model_of(model, single), slice(None), 6 * ranks)


def model_of(model: nn.Module, single: nn.Module) -> nn.Module:
    """One process's model with the weights that the ranks have learned."""
    single = copy.deepcopy(single)
    single.load_state_dict(model.state_dict())
    return single


def outputs_for_frames_are_those_of_the_own_frames(mesh: DeviceMesh) -> None:
    for attention, placement in (("kmct", "append"), ("kmt", "interleave")):
        single = patched(attention, placement)
        model = parallel(single, mesh)
        own, x = own_frames(model, 8), video()
        part = shard_frames(x, model)
        assert torch.equal(part, x[:, own])
        assert_close(model.forward_frames(part), single.forward_frames(x)[:, own], rtol=0, atol=1e-5)
        assert_close(model.forward_tokens(part), single.forward_tokens(x)[:, own], rtol=0, atol=1e-5)
        model.forward_frames(part).square().mean().backward()  # each rank's loss is of its own frames
        single.forward_frames(x).square().mean().backward()
        assert_close(averaged_gradients(model), gradients(single), rtol=0, atol=1e-5)


def shapes_are_checked_on_the_cpu(mesh: DeviceMesh) -> None:
    assert parallel(patched(), mesh).temporal_encoder.frame_group.header_device == torch.device("cpu")


def frames_know_when_they_are(mesh: DeviceMesh) -> None:
    embedding = TemporalEmbedding(WIDTH, 4)
    for attention in ("kmt", "kmct"):
        model = parallel(patched(attention), mesh)
        clips = model.temporal_encoder.frame_group.clips(8 // mesh.size())
        assert clips.times(torch.device("cpu")).tolist() == own_frames(model, 8)
        assert_close(clips.embedding(embedding), embedding.at(8)[:, own_frames(model, 8)])


def zigzag_is_for_causal_masks(mesh: DeviceMesh) -> None:
    ranks, rank, fixed = mesh.size(), dist.get_rank(), masks.causal(8, TOKENS)
    for attention in ("kmct", "causal", recent, fixed):
        assert own_frames(parallel(patched(attention), mesh), 16) == deal(16, ranks, causal=True)[rank]
    for attention in ("kmt", "frame_window", "joint", fixed.T, "neighborhood", "dilated"):
        assert not parallel(patched(attention), mesh).temporal_encoder.frame_group.causal
    single = patched("kmct")
    model = parallel(single, mesh, causal=False)
    assert own_frames(model, 3 * ranks) == deal(3 * ranks, ranks)[rank]
    x = video(3 * ranks)
    assert_close(output(model, shard_frames(x, model)), output(single, x), rtol=0, atol=1e-5)
    large = patched(partial(masks.neighborhood, grid=(9, 9)))
    with pytest.raises(
        ValueError, match="could not be asked at .* of 5 tokens whether it is causal .*; say .*causal=Tr"
    ):
        parallel(large, mesh)
    assert own_frames(parallel(large, mesh, causal=True), 16) == deal(16, ranks, causal=True)[rank]


def a_mesh_of_one_rank_is_one_process(mesh: DeviceMesh) -> None:
    alone = dist.init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("batch", "frames"))["frames"]
    single = patched("kmct")
    model = parallel(single, alone)
    assert own_frames(model, 5) == list(range(5))
    assert torch.equal(output(model, shard_frames(video(5), model)), output(single, video(5)))


def images_are_clips_of_one_frame_a_rank(mesh: DeviceMesh) -> None:
    single = patched("kmt")
    model = parallel(single, mesh)
    x = video(mesh.size())
    assert_close(output(model, x[:, own_frames(model, mesh.size())[0]]), output(single, x), rtol=0, atol=1e-5)


def checkpointing_gathers_again(mesh: DeviceMesh) -> None:
    for placement in PLACEMENTS:
        single = patched("kmct" if placement != "replace" else "causal", placement)
        model = parallel(single, mesh)
        model.set_grad_checkpointing()
        with counted() as calls:
            output(model, shard_frames(video(), model)).square().mean().backward()
        layers = 1 if placement == "append" else DEPTH
        assert [name for name, _ in calls].count("all_gather") == 1 + 2 * layers
        output(single, video()).square().mean().backward()
        assert_close(averaged_gradients(model), gradients(single), rtol=0, atol=1e-5)


def compiled_models_compute_the_same(mesh: DeviceMesh) -> None:
    model = parallel(patched("kmct", image=image_model(depth=1)), mesh)
    x = shard_frames(video(), model)
    assert_close(torch.compile(model, backend="eager")(x), model(x))


def low_precision_and_autocast_run(mesh: DeviceMesh) -> None:
    model = parallel(patched("kmct"), mesh)
    x = shard_frames(video(), model)
    expected = model(x)
    low = copy.deepcopy(model).bfloat16()
    assert_close(low(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16), counted() as calls:
        assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
    values = torch.randn(2, 8, 99, generator=torch.Generator().manual_seed(0)).bfloat16()
    mean = model.temporal_encoder.frame_group.clips(8 // mesh.size()).mean(shard_frames(values, model).flatten(0, 1))
    assert torch.equal(mean, values.float().mean(1).bfloat16())
    assert calls[1] == ("all_gather", 2 * 2 * (8 // mesh.size()) * TOKENS * WIDTH * 2)


# ---- on several processes: what is sent and held --------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The gathers and reduce-scatters of a block of code, and the bytes that each sends to every other rank."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(distributed, name) for name in ("all_gather", "reduce_scatter")}

    def count(name: str, large: Tensor, small: Tensor, **options: Any) -> Any:
        part = min((large, small), key=lambda x: x.numel())
        assert max(large.numel(), small.numel()) == part.numel() * dist.get_world_size(options["group"])
        calls.append((name, part.numel() * part.itemsize))
        return originals[name](large, small, **options)

    for name in originals:
        setattr(distributed, name, partial(count, name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def a_layer_sends_its_keys_and_values_and_their_gradients(mesh: DeviceMesh) -> None:
    batch, frames = 3, 16
    sent = 2 * batch * (frames // mesh.size()) * TOKENS * WIDTH * 4
    for placement, layers in (("append", 1), ("append", 2), ("interleave", DEPTH), ("replace", DEPTH)):
        model = parallel(patched("joint", placement, layers=layers if placement == "append" else None), mesh)
        x = shard_frames(video(frames, batch), model)
        with counted() as calls, CommDebugMode() as everything:
            loss = output(model, x).square().mean()
            assert calls == [("all_gather", 9 * 8)] + [("all_gather", sent)] * layers
            loss.backward()
        assert calls[1 + layers :] == [("reduce_scatter", sent)] * layers
        assert everything.get_total_counts() == len(calls) + 2  # the sum of the mean, and of its gradient


class Recorder(TorchDispatchMode):
    """Which of the operators that matter here run, in order, between the notes of others."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kronmask":
            self.events.append(f"{func.overloadpacket.__name__} {args[1].shape[2]}")
        return func(*args, **(kwargs or {}))


def attention_to_own_frames_hides_both_collectives(mesh: DeviceMesh) -> None:
    events: list[str] = []
    starts = {name: getattr(distributed, name) for name in ("all_gather", "reduce_scatter")}
    wait = distributed._Gather.wait

    def start(name: str, *args: Any, **options: Any) -> Any:
        if options.get("async_op"):
            events.append(f"start {name}")
        return starts[name](*args, **options)

    def noted(self: Any) -> Tensor:
        events.append("wait")
        return wait(self)

    query, key, value = (torch.randn(1, 2, 4 * TOKENS, 4, requires_grad=True) for _ in range(3))
    model = parallel(patched("kmct"), mesh)
    clips = model.temporal_encoder.frame_group.clips(4)
    try:
        for name in starts:
            setattr(distributed, name, partial(start, name))
        distributed._Gather.wait = noted  # type: ignore[method-assign]
        with Recorder(events):
            clips.attend(query, key, value, model.temporal_encoder.blocks[0].attn.mask, TOKENS).sum().backward()
    finally:
        for name, original in starts.items():
            setattr(distributed, name, original)
        distributed._Gather.wait = wait  # type: ignore[method-assign]
    own, others = 4 * TOKENS, 4 * TOKENS * (mesh.size() - 1)
    assert events[:4] == ["start all_gather", f"attention {own}", "wait", f"attention {others}"]
    assert events[5] == "start reduce_scatter"
    assert [event.split()[0] for event in events[4:]] == ["attention_backward", "start", "attention_backward", "wait"]


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all that a forward keeps for its backward, parameters apart."""
    kept = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    parameters = set(kept)

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = output(model, x)
    total = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)
    del result
    return total


def activations_fall_with_the_ranks_but_for_keys_and_values(mesh: DeviceMesh) -> None:
    ranks, batch, frames = mesh.size(), 3, 16
    whole = video(frames, batch)
    held: dict[tuple[int, bool], int] = {}
    for layers in (1, 2):
        single = patched("joint", layers=layers)
        model = parallel(single, mesh)
        held[layers, False], held[layers, True] = (
            saved_bytes(single, whole),
            saved_bytes(model, shard_frames(whole, model)),
        )
    layer = {split: held[2, split] - held[1, split] for split in (False, True)}
    image = {split: held[1, split] - layer[split] for split in (False, True)}
    assert abs(image[True] * ranks / image[False] - 1) < 0.02
    tokens = batch * TOKENS * WIDTH * 4  # bytes of one frame
    gathered, merged = 2 * tokens * (frames - frames // ranks), 2 * tokens * frames // ranks
    assert 0 <= layer[True] - (layer[False] // ranks + gathered + merged) < 0.15 * merged  # LSE and weights


# ---- on several processes: copies, files, refusals ------------------------------------------------------------------


def copies_are_parallel_and_files_are_not(mesh: DeviceMesh) -> None:
    single = patched("kmct")
    model = parallel(single, mesh)
    x = video()
    expected = output(single, x)
    assert_close(output(copy.deepcopy(model), shard_frames(x, model)), expected, rtol=0, atol=1e-5)
    assert_close(dict(model.state_dict()), dict(single.state_dict()), rtol=0, atol=0)
    for write in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(TypeError, match="cannot be pickled.*state_dict.*frame_parallel\\(model, None\\)"):
            write(model)
    assert frame_parallel(model, None) is model
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), x), expected)
    frame_parallel(model, mesh)
    unpatch_vit(model)
    assert not temporal_parameters(model)
    assert_close(output(model, x[:, 0]), output(image_model(), x[:, 0]))


def refusals_reach_every_rank(mesh: DeviceMesh) -> None:
    rank = dist.get_rank()
    single = patched("kmt")
    model = parallel(single, mesh)
    x = video()
    part = shard_frames(x, model)
    inputs: list[tuple[Any, str]] = [
        (part[:, : 4 - rank], r"rank 0 has \(2, 4, 3, 32, 32\) float32; rank 1 has \(2, 3, 3, 32, 32\)"),
        (part[: 2 - rank], r"rank 1 has \(1, 4, 3, 32, 32\)"),
        (part[:, 0] if rank else part, r"rank 1 has \(2, 3, 32, 32\)"),
        (part.double() if rank else part, "rank 1 has .* float64"),
        ("video" if rank else part, "rank 1 has no tensor"),
        (part if rank else part[..., :16], r"rank 0 has \(2, 4, 3, 32, 16\)"),
    ]
    for wrong, message in inputs:
        with pytest.raises(
            ValueError, match=f"all 2 ranks .* must call the model with inputs of one shape: .*{message}"
        ):
            model(wrong)
        assert_close(output(model, part), output(single, x), rtol=0, atol=1e-5)  # as if nothing had been
    with torch.set_grad_enabled(rank == 0), pytest.raises(ValueError, match="rank 1 has .* without gradients"):
        model(part)
    with pytest.raises(TypeError, match="takes a tensor of video"):
        model("video")
    with pytest.raises(ValueError, match="8 frames of 5 tokens, but the clip has 4 frames"):
        parallel(patched(masks.kmt(8, TOKENS)), mesh)(part[:, :2])
    with pytest.raises(ValueError, match="6 frames cannot be dealt to 2 ranks in zigzag"):
        parallel(patched("kmct"), mesh)(part[:, :3])
    clips = model.temporal_encoder.frame_group.clips(2)
    with pytest.raises(ValueError, match="prefix=1"):
        KronAttention(WIDTH, 2)(torch.zeros(1, 1 + 2 * TOKENS, WIDTH), clips, TOKENS, prefix=1)


def patch_dropout_is_refused_in_training(mesh: DeviceMesh) -> None:
    for probability in (0.5, 0.0):
        image = image_model(patch_drop_rate=0.5)
        image.patch_drop.prob = probability  # type: ignore[union-attr]
        single = patched(image=image)
        model = parallel(single, mesh)
        x = video()
        if probability:
            with pytest.raises(ValueError, match="patch dropout .PatchDropout. .* set it to 0"):
                model(shard_frames(x, model))
            model.eval(), single.eval()
        assert_close(output(model, shard_frames(x, model)), output(single, x), rtol=0, atol=1e-5)


def a_mesh_of_two_dimensions_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match='one dimension.*not the 2 .*"frames"'):
        frame_parallel(patched(), mesh)


def a_silent_rank_is_an_error_after_the_timeout(rank: int) -> None:
    model = parallel(patched(), DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=3)), "cpu"))
    if rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 0 of the 2 .* has not heard from all others"):
            model(shard_frames(video(), model))
        assert 2 < time.monotonic() - start < 30


def a_dead_rank_is_an_error_on_the_others(rank: int, mesh: DeviceMesh) -> None:
    model = parallel(patched(), mesh)
    part = shard_frames(video(), model)
    losses = [model.forward_frames(part).sum(), output(model, part).sum()]
    dist.barrier()
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    for run in (*(loss.backward for loss in losses), lambda: model(part)):
        with pytest.raises(RuntimeError, match="rank 0 of the 2 .* has not heard from all others: one has died"):
            run()
    assert time.monotonic() - start < TIMEOUT.total_seconds()


# ---- the processes --------------------------------------------------------------------------------------------------

ON_BOTH: tuple[Callable[[DeviceMesh], None], ...] = (
    a_layer_sends_its_keys_and_values_and_their_gradients,
    activations_fall_with_the_ranks_but_for_keys_and_values,
    outputs_for_frames_are_those_of_the_own_frames,
    shapes_are_checked_on_the_cpu,
    frames_know_when_they_are,
    zigzag_is_for_causal_masks,
    images_are_clips_of_one_frame_a_rank,
    attention_to_own_frames_hides_both_collectives,
    ddp_over_the_frames_learns_what_one_process_learns,
)
ON_TWO = (
    checkpointing_gathers_again,
    low_precision_and_autocast_run,
    a_mesh_of_one_rank_is_one_process,
    copies_are_parallel_and_files_are_not,
    refusals_reach_every_rank,
    patch_dropout_is_refused_in_training,
    compiled_models_compute_the_same,
)


def join(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=TIMEOUT)


def hold(facts: tuple[Callable[[DeviceMesh], None], ...], mesh: DeviceMesh) -> None:
    for fact in facts:
        fact(mesh)
        dist.barrier()


def _two(rank: int, folder: str) -> None:
    join(rank, folder, 2)
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("frames",))
    hold(ON_BOTH + ON_TWO, mesh)
    a_silent_rank_is_an_error_after_the_timeout(rank)
    dist.barrier()
    a_dead_rank_is_an_error_on_the_others(rank, mesh)
    os._exit(0)  # torch may abort while it ends its threads, which is not what is tested


def _four(rank: int, folder: str) -> None:
    join(rank, folder, 4)
    mesh = dist.init_device_mesh("cpu", (4,), mesh_dim_names=("frames",))
    hold(ON_BOTH, mesh)
    square = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "frames"))
    hold((a_mesh_of_two_dimensions_is_refused, batches_and_frames_learn_what_one_process_learns), square)
    os._exit(0)


def batches_and_frames_learn_what_one_process_learns(mesh: DeviceMesh) -> None:
    """Two halves of a batch times two halves of the frames, under wrappers that average over all four."""
    mean = torch.zeros(1)
    distributed.reduce_scatter(mean, torch.ones(4), op=dist.ReduceOp.AVG)  # 4 in torch 2.7, whose gloo sums
    world = dist.init_device_mesh("cpu", (4,))
    averages = mean == 1  # what a mesh of two dimensions needs
    half = slice(2, 4) if mesh["batch"].get_local_rank() else slice(0, 2)
    cases = [("append", attention) for attention in ("kmt", "kmct", "frame_window", recent, ["kmct", "axial"])]
    for placement, attention in (*cases, ("interleave", "kmct"), ("replace", "causal")):
        single = patched(attention, placement)
        model = parallel(single, mesh["frames"])
        learn(DistributedDataParallel(model), model, single, half, 8)
        # sharded by four; and, once, sharded over frames and replicated over batches
        for shards in (world, mesh) if attention == "kmct" and averages else (world,):
            model = copy.deepcopy(single)
            for block in (*(m for m in model.modules() if isinstance(m, VideoBlock)), *model.temporal_encoder.blocks):
                fully_shard(block, mesh=shards)
            fully_shard(model, mesh=shards)
            frame_parallel(model, mesh["frames"])
            learn(model, model, single, half, 8, 1 / mean.item())


@pytest.mark.parametrize("process", [_two, _four], ids=["two", "four"])
def test_on_processes(process: Callable[..., None], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs={_two: 2, _four: 4}[process])
