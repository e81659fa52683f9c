"""What every family of patched models keeps: one suite over the models of `models.py`."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from models import BATCH, CASES, FRAMES, SIZE, averaged, blocks, clip, clips, encode, encoder, image_model, stir
from torch import Tensor, nn

from kronmask import KronMask, attention_backend, masks, param_groups, patch_vit, temporal_parameters, unpatch_vit
from kronmask.patch import VideoEncoder

pytestmark = pytest.mark.filterwarnings("ignore:placement='replace' with attention")

EVERY = pytest.mark.parametrize("name", CASES)
REPLACEABLE = pytest.mark.parametrize("name", [name for name in CASES if CASES[name].replace])
TWO = pytest.mark.parametrize("name", ["timm", "open_clip"])
NAMES = (
    "timm",
    "timm-user-subclass",
    "timm-eva02",
    "open_clip",
    "open_clip-CLIP",
    "open_clip-timm-tower",
    "clip",
    "transformers-ViT",
    "transformers-CLIP",
    "torchvision",
    "own",
)
FAMILIES = pytest.mark.parametrize("name", [name for name in NAMES if name in CASES])
PLACEMENT = pytest.mark.parametrize("placement", ["append", "interleave", "replace"])


def patch(name: str, model: nn.Module | None = None, *, placement: str = "append", **options) -> nn.Module:
    """A patched model; skips the placement that the model refuses, which `test_reference.py` holds it to."""
    if placement == "replace" and not CASES[name].replace:
        pytest.skip("refused, as test_reference.py shows")
    model = image_model(name) if model is None else model
    return patch_vit(model, placement=placement, family=CASES[name].family, **options)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))


def outputs(output) -> tuple[Tensor, ...]:
    """The tensors that a model returns: one, a tuple, or a dictionary of Hugging Face."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(output.values() if isinstance(output, dict) else output)


def differ(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return not torch.allclose(first[0], second[0], atol=1e-5)


# ---- the patched model and the image model --------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("placement", ["append", "interleave"])
def test_zero_init_is_the_image_model_averaged_over_frames(name: str, placement: str) -> None:
    model, video = image_model(name), clips(name)
    expected = averaged(name, model, video)
    assert patch(name, model, placement=placement, frames=3) is model
    assert_same(encode(name, model, video), expected, rtol=1e-5, atol=1e-5)
    assert differ(encode(name, stir(model), video), expected)


@FAMILIES
@PLACEMENT
def test_rotary_time_adds_no_parameter_and_starts_as_the_image_model(name: str, placement: str) -> None:
    image, video = image_model(name), clips(name)
    options = {"attention": "spatial"} if placement == "replace" else {}
    model = patch(name, placement=placement, temporal_embedding="rotary", **options)
    assert not any("embedding" in key for key in temporal_parameters(model))
    assert_same(encode(name, model, video), averaged(name, image, video), rtol=1e-4, atol=1e-5)
    longer = clips(name, 11)
    assert_same(encode(name, model, longer), averaged(name, image, longer), rtol=1e-4, atol=1e-5)


@REPLACEABLE
def test_replace_under_the_spatial_mask_is_the_image_model_averaged_over_frames(name: str) -> None:
    model, video = image_model(name), clips(name)
    expected = averaged(name, model, video)
    patch(name, model, placement="replace", attention=masks.spatial, temporal_embedding=False)
    assert not temporal_parameters(model)
    assert_same(encode(name, model, video), expected, rtol=1e-5, atol=1e-5)


@REPLACEABLE
def test_replace_under_the_joint_mask_mixes_frames(name: str) -> None:
    model, video = image_model(name), clips(name)
    expected = averaged(name, model, video)
    patch(name, model, placement="replace", attention="joint", temporal_embedding=False)
    assert differ(encode(name, model, video), expected)


@EVERY
@PLACEMENT
def test_unpatching_restores_types_keys_attributes_and_outputs(name: str, placement: str) -> None:
    model, images = image_model(name), clips(name)[:, 0]
    state, expected = copy.deepcopy(model.state_dict()), encode(name, model, images)
    types = [type(module) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]  # some models set one when they first run
    stir(patch(name, model, placement=placement, layers=2))
    assert [type(module) for module in model.modules()] != types
    assert unpatch_vit(model) is model
    assert [type(module) for module in model.modules()] == types
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert list(model.state_dict()) == list(state)
    assert_same(encode(name, model, images), expected)


@EVERY
@PLACEMENT
def test_every_new_key_says_temporal_and_pretrained_keys_keep_their_names(name: str, placement: str) -> None:
    model = image_model(name)
    before = set(model.state_dict())
    patch(name, model, placement=placement)
    new = set(model.state_dict()) - before
    assert before <= set(model.state_dict())
    assert new
    assert all("temporal_" in key for key in new)
    assert set(temporal_parameters(model)) == new


@EVERY
@pytest.mark.parametrize("placement", ["append", "interleave"])
def test_every_temporal_parameter_learns_and_the_normal_forward_leaves_none_unused(name: str, placement: str) -> None:
    model = patch(name, init="random", placement=placement).train()
    sum(output.square().sum() for output in encode(name, model, clips(name))).backward()
    for key, parameter in temporal_parameters(model).items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@FAMILIES
@pytest.mark.parametrize("placement", ["append", "interleave"])
@pytest.mark.parametrize("init", ["random", "copy"])
def test_the_other_inits_mix_frames_and_start_the_embedding_at_std_02(name: str, placement: str, init: str) -> None:
    if init == "copy" and not CASES[name].copy:
        pytest.skip("refused, as the next tests show")
    model, video = image_model(name), clips(name)
    expected = averaged(name, model, video)
    patch(name, model, placement=placement, init=init, frames=64)
    assert differ(encode(name, model, video), expected)
    embedding = encoder(name, model).temporal_encoder.embedding.weight
    assert embedding.shape[:3] == (1, 64, 1)
    assert 0.017 < embedding.std() < 0.023


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].copy])
def test_a_copied_block_computes_what_the_image_block_does(name: str) -> None:
    """Under the spatial mask and without temporal embedding, an appended copy of the last block runs that block again."""

    def again(block: nn.Module, args: tuple, kwargs: dict, output):
        tokens = output[0] if isinstance(output, tuple) else output
        return type(block).forward(block, tokens, *args[1:], **kwargs)

    model, video = image_model(name), clips(name)
    handle = blocks(name, model)[-1].register_forward_hook(again, with_kwargs=True)
    expected = averaged(name, model, video)
    handle.remove()
    patch(name, model, init="copy", layers=1, attention="spatial", temporal_embedding=False)
    assert_same(encode(name, model, video), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].copy])
def test_blocks_that_compute_something_else_are_not_copied(name: str) -> None:
    model = image_model(name)
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="init='copy' cannot copy"):
        patch(name, model, init="copy")
    assert [type(module) for module in model.modules()] == types


@TWO
def test_interleaved_copies_take_the_attention_of_their_own_block(name: str) -> None:
    model = patch(name, init="copy", placement="interleave", layers=[2, 0])
    assert list(encoder(name, model).temporal_encoder.residuals) == ["0", "2"]
    for index, residual in encoder(name, model).temporal_encoder.residuals.items():
        attn = blocks(name, model)[int(index)].attn
        weight = attn.qkv.weight if hasattr(attn, "qkv") else attn.in_proj_weight
        assert torch.equal(residual.attn.in_proj_weight, weight)


# ---- clips ----------------------------------------------------------------------------------------------------------


@FAMILIES
@PLACEMENT
def test_images_are_clips_of_one_frame_and_any_number_of_frames_goes(name: str, placement: str) -> None:
    model = stir(patch(name, placement=placement, frames=3))
    video = clips(name, 7)
    assert_same(encode(name, model, video[:, 0]), encode(name, model, video[:, :1]))
    shapes = {output[0].shape for output in (encode(name, model, video[:, :frames]) for frames in (1, 2, 3, 7))}
    assert len(shapes) == 1


@FAMILIES
@PLACEMENT
@pytest.mark.parametrize("attention", ["kmct", "causal"])
def test_under_a_causal_mask_the_past_does_not_depend_on_the_future(name: str, placement: str, attention: str) -> None:
    model = encoder(name, stir(patch(name, placement=placement, attention=attention, frames=FRAMES)))
    video = clips(name)
    later = video.clone()
    later[:, 2:] = 0
    first, second = (outputs(model.forward_frames(x))[-1] for x in (video, later))
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2:], second[:, 2:], atol=1e-5)


@EVERY
def test_the_output_is_the_mean_of_the_frames_and_tokens_are_reachable(name: str) -> None:
    model, video = stir(patch(name, frames=3)), clips(name)
    frames = outputs(encoder(name, model).forward_frames(video))
    assert all(output.shape[:2] == (BATCH, FRAMES) for output in frames)
    clip_outputs = outputs(encoder(name, model)(video))
    assert_same(tuple(output.mean(1) for output in frames), clip_outputs, rtol=1e-5, atol=1e-6)
    tokens = encoder(name, model).forward_tokens(video)
    assert tokens.ndim == 4
    assert tokens.shape[:2] == (BATCH, FRAMES)
    assert tokens.shape[3] in (24, 64)


@TWO
@pytest.mark.parametrize(
    "shape", [(3, SIZE, SIZE), (2, 3, 4, SIZE, SIZE), (1, 2, 3, 4, SIZE, SIZE), (2, 0, 3, SIZE, SIZE)]
)
def test_other_inputs_are_refused_with_their_shape(name: str, shape: tuple[int, ...]) -> None:
    model = patch(name)
    with pytest.raises(
        ValueError, match=r"has shape \(" + ", ".join(map(str, shape)) + r"\), expected video \(B, T, 3, H, W\)"
    ):
        model(torch.zeros(shape))


@pytest.mark.parametrize("name", [n for n in NAMES if n in CASES and n.startswith(("timm", "open_clip"))])
@PLACEMENT
def test_intermediate_layers_keep_their_frames(name: str, placement: str) -> None:
    """With random weights: the last layer of a frame is what follows the temporal layers, and images are as before."""
    if placement == "append":
        image, video = image_model(name), clips(name)
        model = encoder(name, patch(name))
        expected = encoder(name, image).forward_intermediates(video.flatten(0, 1), indices=2, intermediates_only=True)
        actual = model.forward_intermediates(video, indices=2, intermediates_only=True)
        if isinstance(actual, dict):
            expected, actual = expected["image_intermediates"], actual["image_intermediates"]
        assert len(actual) == 2
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs.unflatten(0, (BATCH, FRAMES)))
    model, video = encoder(name, stir(patch(name, placement=placement, frames=FRAMES))), clips(name)
    output = model.forward_intermediates(video, indices=1, intermediates_only=True, output_fmt="NLC")
    last = (output["image_intermediates"] if isinstance(output, dict) else output)[0]
    prefix = model.forward_tokens(video).shape[2] - last.shape[2]
    torch.testing.assert_close(last, model.forward_tokens(video)[:, :, prefix:])


@TWO
def test_cutting_off_blocks_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match="unpatch_vit"):
        patch(name).prune_intermediate_layers(1)


@TWO
@PLACEMENT
def test_a_fixed_mask_and_a_callable_say_what_their_name_says(name: str, placement: str) -> None:
    video, tokens = clips(name), 5
    outputs = [
        encode(name, stir(patch(name, placement=placement, frames=FRAMES, attention=attention)), video)
        for attention in ("kmct", masks.kmct, masks.kmct(FRAMES, tokens))
    ]
    assert_same(outputs[0], outputs[1])
    assert_same(outputs[0], outputs[2])


@TWO
def test_a_fixed_mask_that_does_not_fit_is_refused_with_both_sizes(name: str) -> None:
    with pytest.raises(ValueError, match=r"4 frames of 5 tokens.*8 frames of 5 tokens"):
        patch(name, frames=8, attention=masks.kmt(4, 5))
    with pytest.raises(ValueError, match=r"4 frames of 6 tokens.*4 frames of 5 tokens"):
        patch(name, frames=4, attention=masks.kmt(4, 6))(clips(name))
    model = patch(name, frames=4, attention=masks.kmt(4, 5))
    with pytest.raises(ValueError, match=r"4 frames of 5 tokens.*3 frames of 5 tokens"):
        model(clips(name, 3))


# ---- copies, files, checkpoints -------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_ema(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model).module


@FAMILIES
@PLACEMENT
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save, through_ema])
def test_copies_are_equal_and_independent(
    name: str, placement: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    model, video = stir(patch(name, placement=placement)), clips(name)
    expected = encode(name, model, video)
    other = duplicate(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert_same(encode(name, other, video), expected)
    for changed, kept in ((other, model), (model, duplicate(model))):
        before = encode(name, kept, video)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.5)
        assert_same(encode(name, kept, video), before)
        assert differ(encode(name, changed, video), before)
    keys = set(unpatch_vit(other).state_dict())
    assert keys == set(image_model(name).state_dict())


def test_a_patched_model_loads_in_a_process_that_has_imported_nothing(tmp_path) -> None:
    model, video = stir(patch_vit(clip().eval(), attention=masks.kmt(FRAMES, 5), frames=FRAMES)), clips("open_clip")
    torch.save((model, video, model.encode_image(video)), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, video, expected = torch.load(sys.argv[1], weights_only=False); "
        "torch.testing.assert_close(model.encode_image(video), expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, env=os.environ, timeout=120)


@EVERY
def test_an_image_checkpoint_loads_before_and_after_patching(name: str) -> None:
    image = image_model(name)
    checkpoint = {key: tensor + 0.01 for key, tensor in image.state_dict().items()}
    before, after = image_model(name), stir(patch(name))
    before.load_state_dict(checkpoint)
    patch(name, before)
    temporal = {key: parameter.clone() for key, parameter in temporal_parameters(after).items()}
    before.load_state_dict(temporal, strict=False)
    after.load_state_dict(checkpoint, strict=True)
    assert_same(encode(name, after, clips(name)), encode(name, before, clips(name)))
    for key, parameter in temporal_parameters(after).items():
        assert torch.equal(parameter, temporal[key])


@FAMILIES
def test_a_video_checkpoint_needs_all_temporal_keys_and_only_these(name: str) -> None:
    model = patch(name)
    state = stir(copy.deepcopy(model)).state_dict()
    model.load_state_dict(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    key = next(key for key in state if "temporal_" in key)
    with pytest.raises(RuntimeError, match=r"Missing key.*temporal_"):
        model.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*temporal_"):
        image_model(name).load_state_dict(state)


@TWO
def test_a_checkpoint_of_another_number_of_frames_loads_interpolated(name: str) -> None:
    long, short = patch(name, frames=16, init="random"), patch(name, frames=8)
    embedding = long.temporal_encoder.embedding
    state = long.state_dict()
    short.load_state_dict(state)
    assert torch.equal(short.temporal_encoder.embedding.weight, embedding.at(8))
    assert state["temporal_encoder.embedding.weight"].shape[1] == 16
    assert_same(encode(name, short, clips(name, 8)), encode(name, long, clips(name, 8)), rtol=1e-5, atol=1e-6)


# ---- training -------------------------------------------------------------------------------------------------------


@FAMILIES
@PLACEMENT
def test_checkpointing_changes_neither_output_nor_gradients(name: str, placement: str) -> None:
    model, video = stir(patch(name, placement=placement)).train(), clips(name)
    results = []
    for enable in (False, True):
        encoder(name, model).set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(4)  # for what a model draws in training
        output = encode(name, model, video)
        output[0].square().sum().backward()
        results.append((output, tuple(p.grad for p in encoder(name, model).parameters() if p.grad is not None)))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


@TWO
def test_checkpointing_runs_the_temporal_layers_again_in_backward(name: str) -> None:
    model = patch(name, layers=1).train()
    model.set_grad_checkpointing(True)
    calls = []
    encoder(name, model).temporal_encoder.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    encode(name, model, clips(name))[0].sum().backward()
    assert len(calls) == 2


def lower(name: str, model: nn.Module, dtype: torch.dtype) -> None:
    """In low precision; OpenAI's norms compute in float32 and keep float32 weights."""
    model.to(dtype)
    for module in model.modules() if name == "clip" else ():
        if "norm" in type(module).__name__.lower():
            module.float()


@FAMILIES
@PLACEMENT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_run_and_stay_close(name: str, placement: str, dtype: torch.dtype) -> None:
    model, video = stir(patch(name, placement=placement)), clips(name)
    expected = encode(name, model, video)
    lower(name, model, dtype)
    output = encode(name, model, video.to(dtype))
    assert output[0].dtype == dtype
    assert_same((output[0].float(),), (expected[0],), rtol=0.1, atol=0.1)


@FAMILIES
@PLACEMENT
def test_autocast_keeps_the_dtype_of_the_stream(name: str, placement: str) -> None:
    image, video = image_model(name), clips(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = encode(name, image, video[:, 0])[0].dtype
    model = stir(patch(name, image, placement=placement)).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = encode(name, model, video)
    assert output[0].dtype == expected
    output[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@TWO
def test_a_model_converted_before_patching_gets_temporal_layers_of_its_dtype(name: str) -> None:
    model = patch(name, image_model(name).bfloat16().requires_grad_(False))
    assert {p.dtype for p in temporal_parameters(model).values()} == {torch.bfloat16}
    assert all(p.requires_grad for p in temporal_parameters(model).values())
    model(clips(name).bfloat16())


@TWO
@PLACEMENT
def test_a_compiled_model_needs_one_more_graph_when_frames_first_change_and_no_other(name: str, placement: str) -> None:
    torch._dynamo.reset()
    model = stir(patch(name, placement=placement, frames=6, layers=2)).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    graphs = torch._dynamo.utils.counters["stats"]
    start = graphs["unique_graphs"]
    for frames, batch, limit in (
        (4, 2, 1),
        (6, 2, 2),
        (5, 2, 2),
        (9, 2, 2),
        (2, 2, 2),
        (9, 3, 3),
        (7, 5, 3),
        (3, 4, 3),
    ):
        torch.testing.assert_close(
            compiled(clips(name, frames, batch)), model(clips(name, frames, batch)), rtol=1e-4, atol=1e-5
        )
        assert graphs["unique_graphs"] - start <= limit, (frames, batch)
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "placement"), [("timm", "replace"), ("open_clip", "append")])
def test_a_compiled_model_has_the_gradients_of_the_eager_one(name: str, placement: str) -> None:
    torch._dynamo.reset()
    model = stir(patch(name, placement=placement, frames=6, layers=1)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for frames in (4, 5):
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            run(clips(name, frames)).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@TWO
def test_a_checkpointed_model_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    model = stir(patch(name, layers=1)).train()
    model.set_grad_checkpointing(True)
    output = torch.compile(model, fullgraph=True, backend="eager")(clips(name))
    torch.testing.assert_close(output, model(clips(name)), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@TWO
def test_a_model_exports_for_clips_of_any_size(name: str) -> None:
    model = stir(patch(name, layers=1))
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("frames", min=2, max=64)}}
    exported = torch.export.export(model, (clips(name),), dynamic_shapes=sizes).module()
    torch.testing.assert_close(exported(clips(name, 6, batch=3)), model(clips(name, 6, batch=3)), rtol=1e-4, atol=1e-5)


@TWO
@pytest.mark.parametrize(
    "attention", [masks.kmct, "dilated", masks.kmt(FRAMES, 5)], ids=["callable", "dilated", "KronMask"]
)
def test_masks_of_one_size_compile_without_a_graph_break(name: str, attention) -> None:
    torch._dynamo.reset()
    model = stir(patch(name, attention=attention, frames=FRAMES))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for frames in (FRAMES,) if isinstance(attention, KronMask) else (FRAMES, 3, 5):
        torch.testing.assert_close(compiled(clips(name, frames)), model(clips(name, frames)), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@TWO
def test_distributed_training_finds_no_unused_parameter(name: str, tmp_path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(patch(name).train())
        for _ in range(2):  # the second forward raises if the first left a parameter without gradient
            model(clips(name)).sum().backward()
    finally:
        dist.destroy_process_group()


@EVERY
@PLACEMENT
def test_parameter_groups_hold_each_trainable_parameter_once(name: str, placement: str) -> None:
    model = patch(name, placement=placement)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    groups = param_groups(model, lr=1e-3, temporal_lr_mult=10, weight_decay=0.1)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()} - {id(frozen)}
    by_id = {id(parameter): group for group in groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        if parameter is frozen:
            continue
        group = by_id[id(parameter)]
        assert group["lr"] == pytest.approx(1e-2 if "temporal_" in key else 1e-3)
        part = key.removesuffix(".weight").rpartition(".")[
            2
        ]  # of a temporal embedding or nn.Embedding: the module's name
        embedding = "token" in part or ("pos" in part and "embed" in part) or part in ("class_embedding", "embedding")
        embedding = (embedding and part != "token_embedding") or part.startswith(("rel_pos", "relative_position"))
        if part not in ("rel_pos_h", "rel_pos_w"):
            assert (group["weight_decay"] == 0) == (parameter.ndim < 2 or embedding), key
    assert all(group["params"] for group in groups)
    torch.optim.AdamW(groups)


# ---- arguments ------------------------------------------------------------------------------------------------------


@TWO
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "inside"}, "'append', 'interleave', 'replace'"),
        ({"init": "ones"}, "'zero', 'random', 'copy'"),
        ({"attention": "kmtt"}, "kmt, kmct"),
        ({"attention": 3}, "name, a KronMask or a callable"),
        ({"frames": 0}, "frames must be"),
        ({"frames": 2.0}, "frames must be"),
        ({"temporal_embedding": "rotari"}, "did you mean 'rotary'"),
        ({"temporal_embedding": 1}, "temporal_embedding must be one of True, False, 'rotary', not 1"),
        ({"layers": 0}, "number of temporal blocks"),
        ({"layers": [0, 1]}, "number of temporal blocks"),
        ({"layers": 4, "init": "copy"}, "3 image blocks to copy from"),
        ({"placement": "interleave", "layers": 4}, "from 1 to 3"),
        ({"placement": "replace", "layers": [3]}, "from 0 to 2"),
        ({"placement": "replace", "layers": [0, -3]}, "different block indices"),
        ({"placement": "interleave", "layers": []}, "block indices"),
        ({"placement": "interleave", "layers": "all"}, "block indices"),
    ],
)
def test_bad_arguments_are_refused_with_the_choices_and_change_nothing(name: str, options: dict, message: str) -> None:
    model = image_model(name)
    types, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        patch(name, model, **options)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == keys


@TWO
@pytest.mark.parametrize(
    ("layers", "indices"), [(None, [0, 1, 2]), (1, [0, 1, 2]), (2, [1]), (3, [2]), ([2, 0], [0, 2]), ([-1], [2])]
)
def test_layers_choose_blocks(name: str, layers, indices: list[int]) -> None:
    interleaved = patch(name, placement="interleave", layers=layers).temporal_encoder
    assert list(interleaved.residuals) == [str(index) for index in indices]
    replaced = patch(name, placement="replace", layers=layers)
    assert replaced.temporal_encoder.replaced == tuple(indices)


@TWO
def test_patching_twice_and_unpatching_an_image_model_are_refused(name: str) -> None:
    model = image_model(name)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_vit(model)
    patch(name, model)
    with pytest.raises(ValueError, match="patched already"):
        patch(name, model)
    unpatch_vit(model)
    patch(name, model, placement="replace")
    assert any(isinstance(module, VideoEncoder) for module in model.modules())


def test_an_unknown_model_is_refused_with_the_families() -> None:
    with pytest.raises(TypeError, match=r"Linear.*timm, open_clip"):
        patch_vit(nn.Linear(2, 2))


def test_importing_kronmask_imports_no_model_library() -> None:
    code = "import sys, kronmask; assert not {'timm', 'open_clip', 'torchvision', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@TWO
def test_the_forced_backend_is_used(name: str) -> None:
    model, video = stir(patch(name)), clips(name)
    with attention_backend("dense"):
        dense = encode(name, model, video)
    assert_same(encode(name, model, video), dense, rtol=1e-4, atol=1e-5)
