"""A stream of frames is the whole clip: for every family, placement and causal mask, however the frames are cut into calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import timm.models.vision_transformer as vit
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, clips, encoder, image_model, stir
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from kronmask import FrameStream, kron, masks, ones, patch_vit

FRAMES = 7
MASKS: dict[str, Any] = {
    "kmct": "kmct",
    "causal": "causal",
    "spatial": "spatial",
    "kmct-window": partial(masks.kmct, window=3),
    "causal-window-sink": partial(masks.causal, window=2, sink=2),
    "kmct-window-sink": partial(masks.kmct, window=3, sink=1),
    "window-strided": lambda f, t: masks.causal(f, t, window=5) & masks.dilated(f, t, stride=2) | masks.spatial(f, t),
    "pairs": lambda f, t: kron(torch.arange(f)[:, None] // 2 == torch.arange(f) // 2, ones(t)) & masks.causal(f, t),
    "of the length": lambda f, t: masks.kmct(f, t, window=max(1, f // 3)),
    "groups of heads": ["kmct", partial(masks.causal, window=3, sink=1)],
    "groups with a window": [partial(masks.kmct, window=4), partial(masks.causal, window=2, sink=2)],
    "strided": lambda frames, tokens: masks.causal(frames, tokens) & masks.dilated(frames, tokens, stride=3),
}
WINDOWS = [name for name in MASKS if "window" in name]
PLACEMENT = pytest.mark.parametrize("placement", ["append", "interleave", "replace"])


def image() -> nn.Module:
    torch.manual_seed(0)
    return vit.VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=3, num_heads=2, num_classes=5).eval()


def patched(placement: str = "append", attention: Any = "kmct", frames: int = FRAMES, **options: Any) -> Any:
    model = patch_vit(
        image(), frames=frames, attention=attention, placement=placement, init="random", layers=2, **options
    )
    return stir(model)


def video(frames: int = FRAMES, batch: int = 2) -> Tensor:
    return torch.randn(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(frames))


def in_calls(stream: FrameStream, x: Tensor, cuts: Sequence[int]) -> Tensor:
    """The outputs of a clip given to a stream in calls of so many frames."""
    return torch.cat([stream(part) for part in x.split(list(cuts), dim=1)], dim=1)


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [t for value in values if value is not None for t in tensors(value)]


def compositions(total: int) -> st.SearchStrategy[list[int]]:
    """Ways to cut frames into calls."""
    cuts = st.sets(st.integers(1, total - 1)).map(sorted)
    return cuts.map(lambda at: [b - a for a, b in zip([0, *at], [*at, total], strict=True)])


# ---- the whole clip -------------------------------------------------------------------------------------------------


@PLACEMENT
@pytest.mark.parametrize("name", CASES)
def test_every_family_streams(name: str, placement: str) -> None:
    if placement == "replace" and not CASES[name].replace:
        with pytest.raises(TypeError, match="placement='replace' cannot serve"):
            patch_vit(image_model(name), placement=placement, family=CASES[name].family)
        return
    x, family = clips(name, 5), CASES[name].family
    endless = partial(masks.kmct, window=3)
    for length, attention, embedding in ((5, "causal", True), (None, endless, "rotary")):
        options: dict[str, Any] = {
            "attention": attention,
            "temporal_embedding": embedding,
            "frames": 5,
            "family": family,
        }
        model = stir(patch_vit(image_model(name), placement=placement, **options))
        tower = encoder(name, model)
        options = {"noise": torch.rand(2, 4)} if "MAE" in name else {}
        stream = FrameStream(model, length=length)
        with torch.no_grad():
            expected = tensors(tower.forward_frames(x, **options))
        calls = [tensors(stream(part, **options)) for part in x.split([1, 2, 1, 1], dim=1)]
        actual = [torch.cat(parts, dim=1) for parts in zip(*calls, strict=True)]
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@PLACEMENT
@pytest.mark.parametrize("embedding", [True, False, "rotary"])
@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=5)
@given(cuts=compositions(FRAMES))
def test_a_stream_is_the_whole_clip_however_it_is_cut(
    name: str, embedding: Any, placement: str, cuts: list[int]
) -> None:
    model = _model(placement, name, embedding)
    expected = model.forward_frames(video()).detach()
    assert_close(in_calls(FrameStream(model, length=FRAMES), video(), cuts), expected, rtol=1e-5, atol=1e-5)


def _model(placement: str, name: str, embedding: Any, made: dict[Any, Any] = {}) -> Any:  # noqa: B006 - made once
    if (placement, name, embedding) not in made:
        made[placement, name, embedding] = patched(placement, MASKS[name], temporal_embedding=embedding)
    return made[placement, name, embedding]


@PLACEMENT
@pytest.mark.parametrize("name", [*WINDOWS, "spatial"])
def test_a_window_needs_no_length(name: str, placement: str) -> None:
    model = patched(placement, MASKS[name], temporal_embedding="rotary")
    stream, x = FrameStream(model), video(40, 1)
    expected = model.forward_frames(x).detach()
    assert_close(in_calls(stream, x, [1] * 13 + [2, 5, 1, 9, 10]), expected, rtol=1e-5, atol=1e-5)
    assert stream.frames_seen == [40]


def test_a_mask_of_one_size_and_groups_of_frames_stream() -> None:
    group = torch.arange(FRAMES) // 2
    mask = kron(group[:, None] >= group, ones(5)) & masks.causal(FRAMES, 5)
    model = patched("append", mask)
    expected = model.forward_frames(video()).detach()
    assert_close(in_calls(FrameStream(model), video(), [3, 1, 1, 2]), expected, rtol=1e-5, atol=1e-5)


def test_a_hugging_face_model_streams_its_outputs() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    stir(patch_vit(model, attention="kmct", frames=FRAMES))
    stream, expected = FrameStream(model, length=FRAMES), model.vit.forward_frames(video())
    for t in range(FRAMES):
        output = stream(video()[:, t])
        assert_close(output.last_hidden_state[:, 0], expected.last_hidden_state[:, t].detach(), rtol=1e-5, atol=1e-5)


# ---- streams without an end -----------------------------------------------------------------------------------------


def test_memory_is_that_of_the_window() -> None:
    model = patched("append", partial(masks.kmct, window=4, sink=1), temporal_embedding="rotary")
    stream = FrameStream(model)
    assert stream.cache_bytes == 0
    stream(video(1))
    layers, kept, tokens = 2, 1 + 3, 5
    assert stream.cache_bytes == layers * 2 * (2 * kept * tokens * 24) * 4
    places = {name: tensor.data_ptr() for name, tensor in stream.state_dict().items() if isinstance(tensor, Tensor)}
    before = stream.cache_bytes
    for _ in range(20):
        stream(video(1))
    after = {name: tensor.data_ptr() for name, tensor in stream.state_dict().items() if isinstance(tensor, Tensor)}
    assert stream.cache_bytes == before
    assert {name: after[name] for name in after if "." in name} == {n: places[n] for n in places if "." in n}


def test_rotary_time_is_exact_after_a_million_frames() -> None:
    model = patched("append", partial(masks.kmct, window=3), temporal_embedding="rotary")
    stream, x = FrameStream(model), video(8, 1)
    expected = in_calls(stream, x, [1] * 8)
    late = FrameStream(model)
    late(x[:, :1])
    late.reset()
    late._frames.seen = [10**6]  # in phase with the ring, whose frames are those before the clip
    late._frames.written = 10**6
    actual = in_calls(late, x, [1] * 8)  # two layers with a window of 3 see 4 frames back
    assert_close(actual[:, 4:], expected[:, 4:], rtol=1e-5, atol=1e-5)


def test_a_repeated_embedding_begins_again() -> None:
    model = patched("append", partial(masks.kmct, window=1), frames=4)
    stream, x = FrameStream(model, length=4, repeat=True), video(4, 1)
    first, second = (in_calls(stream, x, [1, 3]) for _ in range(2))
    assert_close(first, model.forward_frames(x).detach(), rtol=1e-5, atol=1e-5)
    assert_close(second, first)  # under a window of one frame nothing else is remembered


def test_no_new_graph_after_the_window_is_full() -> None:
    torch._dynamo.reset()
    model = patched("append", partial(masks.kmct, window=4, sink=1), temporal_embedding="rotary")
    stream, graphs, x = FrameStream(model), CompileCounter(), video(40)
    stream.compile(backend=graphs, fullgraph=True)
    expected = model.forward_frames(x).detach()
    outputs = [stream(x[:, t]) for t in range(4)]
    assert graphs.frame_count == 0  # sees one frame more in each step
    outputs += [stream(x[:, t]) for t in range(4, 40)]
    assert graphs.frame_count == 1
    assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)


# ---- several streams ------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    starts=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    name=st.sampled_from([*WINDOWS, "kmct"]),
    embedding=st.sampled_from([False, "rotary", True]),
)
def test_streams_of_one_batch_start_at_different_times(starts: list[int], name: str, embedding: Any) -> None:
    model, total = _model("append", name, embedding), 16
    x, stream = video(total, 3), FrameStream(_model("append", name, embedding), length=total)
    outputs = []
    for t in range(total):
        stream.reset([row for row, start in enumerate(starts) if start == t and stream.frames_seen])
        outputs.append(stream(x[:, t])[:, 0])
    assert stream.frames_seen == [total - start for start in starts]
    if embedding is True:  # the clip is as long as the stream, so the embedding is laid out alike
        return _assert_laid_out_alike(model, x, starts, outputs, total)
    for row, start in enumerate(starts):
        expected = model.forward_frames(x[row : row + 1, start:]).detach()[0]
        assert_close(torch.stack([o[row] for o in outputs[start:]]), expected, rtol=1e-5, atol=1e-5)


def _assert_laid_out_alike(model: Any, x: Tensor, starts: list[int], outputs: list[Tensor], total: int) -> None:
    for row, start in enumerate(starts):
        clip = torch.cat([x[row : row + 1, start:], torch.zeros(1, start, 3, 32, 32)], dim=1)
        expected = model.forward_frames(clip).detach()[0, : total - start]
        assert_close(torch.stack([o[row] for o in outputs[start:]]), expected, rtol=1e-5, atol=1e-5)


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WINDOWS, "kmct"])
def test_a_state_moves_to_another_stream(name: str, tmp_path: Any) -> None:
    model = _model("interleave", name, True)
    stream, x = FrameStream(model, length=FRAMES), video()
    in_calls(stream, x[:, :4], [1, 2, 1])
    torch.save(stream.state_dict(), tmp_path / "stream.pt")
    expected = in_calls(stream, x[:, 4:], [2, 1])
    other = FrameStream(copy.deepcopy(model), length=FRAMES)
    other.load_state_dict(torch.load(tmp_path / "stream.pt", weights_only=True))
    assert other.frames_seen == [4, 4]
    assert_close(in_calls(other, x[:, 4:], [2, 1]), expected)


def test_a_reset_stream_takes_other_sizes() -> None:
    model = patched()
    stream = FrameStream(model, length=FRAMES)
    first = in_calls(stream, video(), [3, 4])
    stream.reset()
    assert_close(in_calls(stream, video(), [7]), first, rtol=1e-5, atol=1e-5)
    stream.reset()
    assert stream(video(2, 1)).shape == (1, 2, 5)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "pair"), [("kmt", "frame 0 sees frame 1"), ("axial", "frame 0 sees frame 1")])
def test_a_mask_that_looks_ahead_is_refused_with_the_first_pair(attention: str, pair: str) -> None:
    with pytest.raises(ValueError, match=pair):
        FrameStream(patched(attention=attention), length=FRAMES)


def test_a_fixed_mask_that_looks_ahead_is_refused_with_the_first_pair() -> None:
    time = torch.ones(FRAMES, FRAMES).tril().bool()
    time[2, 5] = True
    with pytest.raises(ValueError, match="frame 2 sees frame 5"):
        FrameStream(patched(attention=kron(time, ones(5))))


@pytest.mark.parametrize("name", ["pairs", "of the length", "strided", "groups of heads"])
def test_a_mask_that_does_not_repeat_needs_a_length(name: str) -> None:
    with pytest.raises(ValueError, match="or each another number, so a stream without an end"):
        FrameStream(patched(attention=MASKS[name], temporal_embedding="rotary"))(video(1))


def test_what_has_an_end_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match="learned temporal embedding .* length=frames"):
        FrameStream(patched())
    with pytest.raises(ValueError, match="under attention kmct frames see more than 256 frames"):
        FrameStream(patched(temporal_embedding="rotary"))
    with pytest.raises(ValueError, match="under attention kmct frames see more than 256 frames"):
        FrameStream(patched(), length=8, repeat=True)
    with pytest.raises(ValueError, match="repeat=True goes on beyond a length"):
        FrameStream(patched(temporal_embedding=False, attention=MASKS["kmct-window"]), repeat=True)
    with pytest.raises(ValueError, match="length must be a number of frames"):
        FrameStream(patched(), length=0)
    with pytest.raises(TypeError, match="has 0 patched encoders"):
        FrameStream(image(), length=8)


def test_a_stream_that_is_refused_frames_is_as_it_was() -> None:
    model = patched()
    stream, x = FrameStream(model, length=FRAMES), video()
    expected = model.forward_frames(x).detach()
    outputs = [stream(x[:, :3])]
    for wrong, message in (
        (video(5), "ends after 7 frames and has seen 3, so it cannot take 5 more"),
        (video(1, 3), "a batch of 2 streams"),
        (video(1)[..., :16], r"shape \(3, 32, 32\) and torch.float32"),
        (video(1).double(), "torch.float64"),
        (torch.zeros(3, 32, 32), r"not \(3, 32, 32\)"),
        (x[:, :0], "got 0 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(wrong)
    model.train()
    with pytest.raises(RuntimeError, match="call model.eval"):
        stream(x[:, 3:])
    model.eval()
    outputs.append(stream(x[:, 3:]))
    assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_a_call_that_fails_halfway_is_not_gone_on_from() -> None:
    model = patched()
    stream = FrameStream(model, length=FRAMES)
    stream(video(1))
    state = copy.deepcopy(stream.state_dict())

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.temporal_encoder.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        stream(video(1))
    handle.remove()
    with pytest.raises(RuntimeError, match="has failed halfway"):
        stream(video(1))
    stream.load_state_dict(state)
    assert_close(stream(video()[:, 1:3]), _after_one(model), rtol=1e-5, atol=1e-5)


def _after_one(model: Any) -> Tensor:
    stream = FrameStream(model, length=FRAMES)
    stream(video(1))
    return stream(video()[:, 1:3])


def test_the_state_of_another_stream_is_refused() -> None:
    stream = FrameStream(patched(attention=MASKS["kmct-window"]), length=FRAMES)
    stream(video(1))
    with pytest.raises(ValueError, match="not the state of a stream"):
        stream.load_state_dict({"weight": torch.zeros(1)})
    other = FrameStream(patched(), length=FRAMES)
    other(video(1))
    with pytest.raises(ValueError, match="keep 6 frames, but this stream's mask keeps 2"):
        stream.load_state_dict(other.state_dict())
    assert stream.frames_seen == [1, 1]


def test_the_frame_stream_prints_where_it_stands() -> None:
    stream = FrameStream(patched(), length=FRAMES)
    stream(video(2))
    assert repr(stream) == "FrameStream(VisionTransformer, length=7, frames_seen=[2, 2])"
