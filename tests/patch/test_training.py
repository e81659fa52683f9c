"""Patched models train under what people train with: one model of timm and one of Hugging Face, in each placement."""

from __future__ import annotations

import copy
import functools
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm.models.vision_transformer as vit
import timm.utils
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from kronmask import patch_vit, temporal_parameters, unpatch_vit
from kronmask.nn import KronAttention, TemporalEmbedding
from kronmask.patch.video import VideoBlock

ATTENTION = {"append": "kmt", "interleave": "kmt", "replace": "causal"}
BOTH = pytest.mark.parametrize("name", ["timm", "transformers"])
PLACEMENT = pytest.mark.parametrize("placement", ATTENTION)
REENTRANT = pytest.mark.parametrize("implementation", list(CheckpointImpl), ids=lambda kind: kind.name.lower())

Size = tuple[int, int]
"""Frames and clips of a batch."""


def image_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "timm":
        return vit.VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=3, num_heads=2, num_classes=5)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=5)
    return transformers.ViTForImageClassification(config)


def meta_model(name: str) -> nn.Module:
    """The model constructed on the meta device; moved there where an old release of timm computes while it constructs."""
    try:
        with torch.device("meta"):
            return image_model(name)
    except RuntimeError:
        return image_model(name).to("meta")


def patched(name: str, placement: str, image: nn.Module | None = None) -> nn.Module:
    image = image_model(name) if image is None else image
    return patch_vit(image, placement=placement, attention=ATTENTION[placement], init="random", frames=4)


def video(frames: int = 4, batch: int = 2) -> Tensor:
    return torch.randn(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(100 * frames + batch))


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result.logits


def encoder(model: nn.Module) -> Any:
    return getattr(model, "vit", model)


def blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, VideoBlock)]


def temporal_layers(model: nn.Module) -> list[nn.Module]:
    temporal = encoder(model).temporal_encoder
    return [*temporal.blocks, *temporal.residuals.values()]


def loss(model: nn.Module, *sizes: Size) -> Tensor:
    return sum((output(model, video(*size)).float().square().sum() for size in sizes), torch.zeros(()))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By names without what wrappers put in front of them; the model has none afterwards."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    assert_close(gradients(model), gradients(expected), rtol=1e-4, atol=1e-5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, scale: float = 1.0) -> Tensor:
    """One step of learning; the output before it."""
    optimizer.zero_grad()
    result = output(model, x)
    (scale * result.square().mean()).backward()
    optimizer.step()
    return result.detach()


# ---- several processes ----------------------------------------------------------------------------------------------

SHARDED: dict[str, Callable[[nn.Module], Sequence[nn.Module]]] = {
    "the model": lambda model: [],
    "temporal layers": lambda model: temporal_layers(model),
    "all layers": lambda model: [encoder(model).temporal_encoder.embedding, *temporal_layers(model), *blocks(model)],
}
"""Which modules are units of FSDP2 by themselves, besides the model."""


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _learn_on_half(rank: int, model: nn.Module, wrapped: nn.Module, scale: float, expected: nn.Module) -> None:
    """Two steps on half of a batch leave what two steps of `expected` on the whole batch leave."""
    whole, optimizers = video(5, 4), (sgd(wrapped), sgd(expected))
    for _ in range(2):
        half = step(wrapped, optimizers[0], whole.chunk(2)[rank], scale)
        assert_close(half, step(expected, optimizers[1], whole).chunk(2)[rank], rtol=0, atol=1e-5)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        assert_close(dict(state), dict(expected.state_dict()), rtol=0, atol=1e-5)


def _process(rank: int, folder: str) -> None:
    dist = torch.distributed
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mean = torch.zeros(1)
    dist.reduce_scatter_tensor(mean, torch.ones(2), op=dist.ReduceOp.AVG)  # 2 in torch 2.7, whose gloo sums instead
    for name in ("timm", "transformers"):
        for placement in ATTENTION:
            expected = patched(name, placement)
            model = copy.deepcopy(expected)
            _learn_on_half(rank, model, nn.parallel.DistributedDataParallel(model), 1.0, copy.deepcopy(expected))
            for units in SHARDED.values():
                model, mesh = copy.deepcopy(expected), dist.init_device_mesh("cpu", (2,))
                for unit in (*units(model), model):
                    fully_shard(unit, mesh=mesh)
                _learn_on_half(rank, model, model, 1 / mean.item(), copy.deepcopy(expected))
    dist.barrier()
    os._exit(0)  # torch may abort while it ends its threads, which is not what is tested


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)


# ---- activation checkpointing ---------------------------------------------------------------------------------------


def checkpointed(model: nn.Module, implementation: CheckpointImpl) -> nn.Module:
    """A copy whose blocks are wrapped by torch, which knows nothing of clips."""
    model = copy.deepcopy(model)
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: isinstance(module, VideoBlock)
    )
    return model


@BOTH
@PLACEMENT
@REENTRANT
def test_blocks_that_torch_checkpoints_have_the_same_gradients(
    name: str, placement: str, implementation: CheckpointImpl
) -> None:
    model = patched(name, placement)
    wrapped, calls = checkpointed(model, implementation), []
    for module in (*blocks(wrapped), *temporal_layers(wrapped)):
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
    forward = loss(wrapped, (4, 2))
    assert len(calls) == 3 + len(temporal_layers(wrapped))
    forward.backward()
    assert len(calls) == 2 * (3 + len(temporal_layers(wrapped)))
    loss(model, (4, 2)).backward()
    assert_same_gradients(wrapped, model)


@BOTH
@PLACEMENT
@REENTRANT
def test_pending_forwards_are_recomputed_with_their_own_frames(
    name: str, placement: str, implementation: CheckpointImpl
) -> None:
    model = patched(name, placement)
    wrapped = checkpointed(model, implementation)
    for sizes in ([(6, 2), (4, 3)], [(1, 12), (12, 1)], [(4, 2), (5, 2)], [(2, 6), (3, 2), (3, 4)]):
        loss(model, *sizes).backward()
        expected = gradients(model)
        loss(wrapped, *sizes).backward()
        assert_close(gradients(wrapped), expected, rtol=1e-4, atol=1e-5)
        for part in [loss(wrapped, size) for size in sizes]:  # the first forward is the first to be differentiated
            part.backward()
        assert_close(gradients(wrapped), expected, rtol=1e-4, atol=1e-5)
        first = loss(wrapped, sizes[0])
        with torch.no_grad():
            loss(wrapped, *sizes[1:])
        first.backward()
        loss(model, sizes[0]).backward()
        assert_same_gradients(wrapped, model)


@BOTH
@PLACEMENT
def test_pending_tokens_and_intermediate_outputs_are_recomputed_with_their_own_frames(
    name: str, placement: str
) -> None:
    model = patched(name, placement)
    wrapped = checkpointed(model, CheckpointImpl.NO_REENTRANT)

    def features(model: nn.Module, size: Size) -> Tensor:
        if name == "timm":
            return encoder(model).forward_intermediates(video(*size), intermediates_only=True)[0]
        return encoder(model)(video(*size), output_hidden_states=True).hidden_states[1]

    for run in (lambda model, size: encoder(model).forward_tokens(video(*size)), features):
        for differentiated in (0, 1):
            for each in (model, wrapped):
                pending = [run(each, size) for size in ((6, 2), (4, 3))]
                pending[differentiated].square().sum().backward()
            assert_same_gradients(wrapped, model)


@BOTH
def test_a_block_alone_is_refused_whatever_has_run_before(name: str) -> None:
    model = patched(name, "append")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="called on 8 images outside of the model's forward"):
            blocks(model)[0](torch.randn(8, 5, 24))
        loss(model, (4, 2)).backward()


@BOTH
@PLACEMENT
def test_temporal_layers_learn_in_a_frozen_model_that_checkpoints_itself(name: str, placement: str) -> None:
    model = patched(name, placement, image_model(name).requires_grad_(False)).train()
    wrapped = copy.deepcopy(model)
    if name == "timm":
        wrapped.set_grad_checkpointing(True)
    else:
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model, wrapped):
        torch.manual_seed(0)
        loss(each, (4, 2)).backward()
    assert {key for key, p in wrapped.named_parameters() if p.grad is not None} == set(temporal_parameters(wrapped))
    assert_same_gradients(wrapped, model)


@BOTH
@PLACEMENT
def test_reentrant_checkpointing_of_a_frozen_model_is_refused(name: str, placement: str) -> None:
    frozen = patched(name, placement, image_model(name).requires_grad_(False))
    model = checkpointed(frozen, CheckpointImpl.REENTRANT)
    with pytest.raises(RuntimeError, match="gives its temporal layers no gradient"):
        loss(model, (4, 2))
    with torch.no_grad():
        loss(model, (4, 2))
    for parameter in temporal_parameters(model).values():
        parameter.requires_grad_(False)
    loss(model, (4, 2))  # nothing is to learn


# ---- averaged, low-precision, frozen, adapted models ----------------------------------------------------------------


@BOTH
@PLACEMENT
@pytest.mark.parametrize("average", ["timm", "torch"])
def test_averaged_models_are_patched_models_of_averaged_weights(name: str, placement: str, average: str) -> None:
    model = patched(name, placement)
    averaged: Any = timm.utils.ModelEmaV3(model, decay=0.5) if average == "timm" else AveragedModel(model)
    update = averaged.update if average == "timm" else averaged.update_parameters
    before = copy.deepcopy(model.state_dict())
    if average == "torch":
        update(model)  # the first is a copy
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1), video())
    update(model)
    expected = patched(name, placement)
    expected.load_state_dict({key: torch.lerp(before[key], now, 0.5) for key, now in model.state_dict().items()})
    assert_close(dict(averaged.module.state_dict()), dict(expected.state_dict()))
    assert_close(output(averaged.module.eval(), video(6)), output(expected.eval(), video(6)))


@BOTH
@PLACEMENT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_low_precision_runs_and_autocast_trains(name: str, placement: str, dtype: torch.dtype) -> None:
    model = patched(name, placement).eval()
    expected = output(model, video()).detach()
    low = output(copy.deepcopy(model).to(dtype), video().to(dtype))
    assert low.dtype == dtype
    assert_close(low.float(), expected, rtol=0.05, atol=0.05)
    exact = copy.deepcopy(model)
    loss(exact, (4, 2)).backward()
    with torch.autocast("cpu", dtype):
        assert_close(output(model, video()).float(), expected, rtol=0.05, atol=0.05)
        loss(model, (4, 2)).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    for key, gradient in gradients(exact).items():
        actual = dict(model.named_parameters())[key].grad
        assert actual is not None
        assert (actual - gradient).norm() <= 0.05 * gradient.norm() + 1e-3, key


@BOTH
@PLACEMENT
def test_a_model_of_the_meta_device_gets_its_weights_after_patching(name: str, placement: str) -> None:
    source = patched(name, placement).eval()
    expected = output(source, video(6))
    for assign in (False, True):
        model = patched(name, placement, meta_model(name)).eval()
        assert all(parameter.is_meta for parameter in model.parameters())
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(output(model, video(6)), expected)
    model = patched(name, placement).to("meta").to_empty(device="cpu").eval()
    model.load_state_dict(source.state_dict())
    assert torch.equal(output(model, video(6)), expected)


@BOTH
@PLACEMENT
def test_assigned_weights_are_the_model_s_own(name: str, placement: str) -> None:
    model, state = patched(name, placement), patched(name, placement).state_dict()
    model.load_state_dict(state, assign=True)
    assert all(p.data_ptr() == state[key].data_ptr() for key, p in model.named_parameters())
    before = output(model, video()).detach()
    step(model, torch.optim.SGD(model.parameters(), lr=0.5), video())
    assert not torch.allclose(output(model, video()), before)
    image = {key: tensor.clone() for key, tensor in image_model(name).state_dict().items()}
    temporal = {key: p.detach().clone() for key, p in temporal_parameters(model).items()}
    model.load_state_dict(image, assign=True)
    assert_close(dict(model.state_dict()), {**image, **temporal}, rtol=0, atol=0)


@BOTH
@PLACEMENT
def test_a_frozen_image_model_learns_its_temporal_parameters_only(name: str, placement: str) -> None:
    model = patched(name, placement, image_model(name).requires_grad_(False)).train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), video())
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == set(temporal_parameters(model))


@BOTH
@PLACEMENT
def test_hooks_fire_once_and_those_within_the_model_see_frames(name: str, placement: str) -> None:
    model, seen = patched(name, placement), []
    block = blocks(model)[1]
    attention = block.attn if name == "timm" else block.attention

    def shape(value: Any) -> tuple[int, ...]:
        value = value[0] if isinstance(value, tuple) else value
        return tuple(getattr(value, "logits", value).shape)

    for label, module in (("model", model), ("block", block), ("attention", attention)):

        def before(module: nn.Module, args: Any, kwargs: Any, label: str = label) -> None:
            seen.append((label, "before", shape(args or tuple(kwargs.values()))))

        def after(module: nn.Module, args: Any, result: Any, label: str = label) -> None:
            seen.append((label, "after", shape(result)))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    output(model, video())
    frames = (8, 5, 24)
    assert seen == [
        ("model", "before", (2, 4, 3, 32, 32)),
        ("block", "before", frames),
        ("attention", "before", frames),
        ("attention", "after", frames),
        ("block", "after", frames),
        ("model", "after", (2, 5)),
    ]


@BOTH
@PLACEMENT
def test_layers_are_found_by_the_names_of_the_image_model_s(name: str, placement: str) -> None:
    """As Accelerate and FSDP look for the layers they wrap."""
    image, model = image_model(name), patched(name, placement)
    for before, after in zip(image.modules(), unwrapped(model), strict=True):
        assert type(after).__name__ == type(before).__name__
        assert type(after).__module__ == type(before).__module__


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """The modules of a patched model that are not temporal, in order."""
    return [module for path, module in model.named_modules() if "temporal_" not in path]


def test_a_model_that_another_one_s_hook_runs_keeps_its_own_tokens() -> None:
    outer, inner = patched("timm", "append"), patched("timm", "append")
    expected, other = encoder(outer).forward_tokens(video(4)), encoder(inner).forward_tokens(video(2))
    seen = []
    blocks(outer)[1].register_forward_hook(lambda *_: seen.append(encoder(inner).forward_tokens(video(2))))
    assert_close(encoder(outer).forward_tokens(video(4)), expected)
    assert_close(seen, [other])


@BOTH
@PLACEMENT
def test_hooks_of_a_block_change_what_the_model_computes(name: str, placement: str) -> None:
    model = patched(name, placement)
    expected = output(model, video())
    hook = blocks(model)[1].register_forward_hook(
        lambda module, args, result: (0 * result[0], *result[1:]) if isinstance(result, tuple) else 0 * result
    )
    assert not torch.allclose(output(model, video()), expected)
    hook.remove()
    assert torch.equal(output(model, video()), expected)


@BOTH
@PLACEMENT
def test_low_rank_adapters_learn_and_merge(name: str, placement: str) -> None:
    peft = pytest.importorskip("peft")
    model = patched(name, placement)
    original, start = copy.deepcopy(model), output(model, video(6)).detach()
    attention = ["qkv"] if name == "timm" else ["query", "value", "q_proj", "v_proj"]  # by release
    config = peft.LoraConfig(r=2, target_modules=[*attention, "c_fc"], modules_to_save=["temporal_encoder"])
    adapted = peft.get_peft_model(model, config)
    assert_close(output(adapted, video(6)), start)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        step(adapted, optimizer, video())
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    learned = output(adapted.eval(), video(6))
    assert not torch.allclose(learned, start, atol=1e-3)
    merged = adapted.merge_and_unload()
    assert_close(output(merged, video(6)), learned)
    assert set(merged.state_dict()) == set(original.state_dict())
    assert type(merged) is type(original)
    changed = {
        key for key, tensor in merged.state_dict().items() if not torch.equal(tensor, original.state_dict()[key])
    }
    assert changed >= set(temporal_parameters(merged))
    assert any("temporal_encoder" not in key for key in changed)
    assert set(unpatch_vit(merged).state_dict()) == set(image_model(name).state_dict())


# ---- threads --------------------------------------------------------------------------------------------------------


@BOTH
@PLACEMENT
def test_threads_run_one_model_on_clips_of_different_lengths_at_once(name: str, placement: str) -> None:
    model = patched(name, placement)
    sizes = [(2, 6), (3, 4), (4, 3), (6, 2), (12, 1), (5, 2)]

    def run(size: Size) -> tuple[Tensor, Tensor]:
        x = video(*size).requires_grad_()
        result = output(model, x)
        return result.detach(), torch.autograd.grad(result.square().sum(), x)[0]

    expected = {size: run(size) for size in sizes}
    wrong: list[Any] = []
    start = threading.Barrier(2)

    def work(order: list[Size]) -> None:
        start.wait()
        try:
            for _ in range(8):
                for size in order:
                    assert_close(run(size), expected[size])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(order,)) for order in (sizes, sizes[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- compiled and exported models -----------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@PLACEMENT
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_learns_as_the_eager_one(placement: str) -> None:
    model = patched("timm", placement)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    optimizers = [sgd(model), sgd(compiled)]
    for size in ((4, 2), (4, 2)):  # of other sizes is another suite
        assert_close(step(compiled, optimizers[1], video(*size)), step(model, optimizers[0], video(*size)))
    assert_close(list(compiled.parameters()), list(model.parameters()), rtol=1e-4, atol=1e-5)


@PLACEMENT
@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_compiled_one_by_one_learn_as_the_eager_ones(placement: str) -> None:
    model = patched("timm", placement)
    compiled, graphs = copy.deepcopy(model), CompileCounter()
    for block in blocks(compiled):
        block.compile(backend=graphs)
    optimizers = [sgd(model), sgd(compiled)]
    for size in ((4, 2), (2, 4), (5, 2)):  # the first two have as many frames in all
        assert_close(step(compiled, optimizers[1], video(*size)), step(model, optimizers[0], video(*size)))
    assert graphs.frame_count >= 1
    assert_close(list(compiled.parameters()), list(model.parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["append", "replace"])
@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_compiled_one_by_one_share_the_graph_of_their_kind(placement: str) -> None:
    deep = vit.VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=9, num_heads=2, num_classes=5)
    model, graphs = patched("timm", placement, deep.eval()), CompileCounter()
    for block in blocks(model):
        block.compile(backend=graphs)
    with torch.no_grad():
        model(video())
    assert graphs.frame_count <= 3  # of 9 blocks


@pytest.mark.usefixtures("fresh_compiler")
def test_a_checkpointed_model_with_replaced_attention_compiles_in_parts() -> None:
    model = patched("timm", "replace")
    compiled = copy.deepcopy(model)
    compiled.set_grad_checkpointing(True)
    loss(torch.compile(compiled, backend="eager"), (4, 2)).backward()
    loss(model, (4, 2)).backward()
    assert_same_gradients(compiled, model)


class Logits(nn.Module):
    """A classifier of either library, from one tensor to one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return output(self.model, x)


@BOTH
@PLACEMENT
def test_an_exported_model_is_saved_for_clips_of_any_size(name: str, placement: str, tmp_path: Path) -> None:
    model = Logits(patched(name, placement).eval())
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("frames", min=2, max=64)}
    torch.export.save(torch.export.export(model, (video(),), dynamic_shapes={"x": sizes}), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for size in ((4, 2), (6, 3), (2, 5), (9, 2)):
        assert_close(exported(video(*size)), model(video(*size)), rtol=1e-4, atol=1e-5)


# ---- parameters, modules, copies ------------------------------------------------------------------------------------


@BOTH
@PLACEMENT
def test_every_parameter_gets_a_gradient(name: str, placement: str) -> None:
    model = patched(name, placement).train()
    loss(model, (4, 2)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        if not key.endswith(("key.bias", "k_proj.bias")):  # attention does not depend on it
            assert parameter.grad.abs().max() > 1e-6, key


@BOTH
def test_replaced_attention_adds_the_temporal_embedding_and_nothing_else(name: str) -> None:
    image, model = image_model(name), patched(name, "replace")
    new = {key: tensor.shape for key, tensor in model.state_dict().items() if key not in image.state_dict()}
    assert list(new.values()) == [(1, 4, 1, 24)]
    assert set(new) == set(temporal_parameters(model))
    bare = patch_vit(image, placement="replace", attention="causal", temporal_embedding=False)
    assert set(bare.state_dict()) == set(image_model(name).state_dict())


@BOTH
@PLACEMENT
def test_modules_form_a_tree_and_their_names_do_not_change(name: str, placement: str) -> None:
    model, image, visited = patched(name, placement), image_model(name), []
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    assert len(paths) == len(set(model.modules()))  # one path to each: no cycle, nothing shared
    model.apply(visited.append)
    assert len(visited) == len(paths)
    assert not [path for path in paths if "link" in path]
    keys = [key for key, _ in model.named_parameters(remove_duplicate=False)]
    output(model, video())
    assert keys == [key for key, _ in model.named_parameters()] == list(model.state_dict())
    assert keys == list(patched(name, placement).state_dict())
    assert {key for key in keys if "temporal_" not in key} == set(image.state_dict())


@BOTH
@PLACEMENT
def test_a_copied_block_is_another_block_of_the_same_encoder(name: str, placement: str) -> None:
    model = patched(name, placement)
    expected = output(model, video())
    block = blocks(model)[1]
    copied = copy.deepcopy(block)
    assert copied.temporal_link.encoder is encoder(model)
    parent = next(module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential)))
    parent[1] = copied
    assert torch.equal(output(model, video()), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not torch.allclose(output(model, video()), expected)
    parent[1] = block
    assert torch.equal(output(model, video()), expected)
    whole = copy.deepcopy(model)
    assert all(module.temporal_link.encoder is encoder(whole) for module in blocks(whole))


def test_models_load_in_a_process_that_has_imported_nothing(tmp_path: Path) -> None:
    models = [patched(name, placement) for name in ("timm", "transformers") for placement in ATTENTION]
    expected = [output(model, video(6)).detach() for model in models]
    torch.save((models, video(6), expected), tmp_path / "models.pt")
    code = (
        "import sys, torch; models, video, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "for model, output in zip(models, expected, strict=True):\n"
        "    result = model(video); result = getattr(result, 'logits', result)\n"
        "    torch.testing.assert_close(result, output)\n"
        "    result.sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "models.pt")], check=True, env=os.environ, timeout=120)


@BOTH
@PLACEMENT
def test_the_state_of_model_and_optimizer_resumes_training(name: str, placement: str) -> None:
    model, file = patched(name, placement), io.BytesIO()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer, video())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = patch_vit(
        image_model(name), placement=placement, attention=ATTENTION[placement], init="zero", frames=4
    ).train(model.training)
    resumed.load_state_dict(saved["model"])
    again = torch.optim.AdamW(resumed.parameters(), lr=0.1)
    again.load_state_dict(saved["optimizer"])
    for frames in (4, 6):
        assert_close(step(resumed, again, video(frames)), step(model, optimizer, video(frames)))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@BOTH
@PLACEMENT
def test_temporal_weights_can_be_parametrized(name: str, placement: str) -> None:
    model = patched(name, placement)
    expected = output(model, video(6))
    for module in list(encoder(model).temporal_encoder.modules()):
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
        elif isinstance(module, KronAttention):
            parametrizations.weight_norm(module, "in_proj_weight")
        elif isinstance(module, TemporalEmbedding):
            parametrize.register_parametrization(module, "weight", Doubled())
    parametrizations.weight_norm(next(module for module in blocks(model)[0].modules() if isinstance(module, nn.Linear)))
    assert_close(output(model, video(6)), expected)
    copied = copy.deepcopy(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.5), video())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_close(output(copied, video(6)), expected)
    assert not torch.allclose(output(model, video(6)), expected)
    assert all("parametrizations" in key or "temporal_encoder" in key for key in temporal_parameters(model))
