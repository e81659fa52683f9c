"""Official checkpoints say by themselves what they are, and their pickles are read without being executed."""

import os
import pickle
import struct
import time
import warnings
from argparse import Namespace

import pytest
import torch
from claver.config import Config
from claver.model import build_model
from claver.settings import from_dict
from claver.weights.checkpoint import CheckpointError, load_checkpoint, load_model
from claver.weights.official import IMAGENET_MEAN, describe_official, find_settings, read_pickle
from official_files import official_config, official_names, write_official
from small import small_model

# heads are 64 wide in all of OpenAI's models, which the weights do not tell
VISION = {"layers": 3, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 96, "width": 64, "heads": 1, "layers": 1}


def official_model(**changes):
    torch.manual_seed(0)
    return build_model(small_model(vision=VISION, text=TEXT, **changes)).eval()


@pytest.fixture(scope="module")
def kmct():
    return official_model(attention="kmct")


@pytest.fixture(scope="module")
def state(kmct):
    return official_names(kmct.state_dict())


@pytest.mark.parametrize("mask", ["KMCT", "kmct", "KmCt"])
@pytest.mark.parametrize("section", ["MODEL", "AUG"])
def test_an_official_checkpoint_needs_no_configuration(tmp_path, kmct, state, mask, section):
    config = official_config()
    del config["MODEL"]["MASK_MODE"]
    config.setdefault(section, {})["MASK_MODE"] = mask
    model, content = load_model(write_official(tmp_path / "o.pth", state, config))
    settings = from_dict(content["config"])
    assert (settings.model.attention, settings.model.frames, settings.model.layers) == ("kmct", 4, 1)
    assert (settings.augment.size, settings.augment.short_side, settings.augment.mean) == (32, 37, IMAGENET_MEAN)
    video, tokens = torch.randn(2, 4, 3, 32, 32), torch.randint(0, 96, (2, 3, 16))
    with torch.no_grad():
        assert torch.equal(model(video, tokens), kmct(video, tokens))
        kmt = official_model()
        kmt.load_state_dict(kmct.state_dict())
        assert not torch.allclose(model(video, tokens), kmt(video, tokens), atol=1e-3)  # so it has to be known


def test_settings_may_be_attributes(tmp_path, state):
    config = Namespace(DATA={"NUM_FRAMES": 4}, MODEL=Namespace(MASK_MODE="KMCT"))
    torch.save({"model": state, "config": config}, tmp_path / "o.pth")
    assert load_checkpoint(tmp_path / "o.pth")["config"]["model"]["attention"] == "kmct"


def test_weights_of_a_distributed_run_and_without_a_configuration_load(tmp_path, kmct, state):
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    config = Config(model=small_model(vision=VISION, text=TEXT, attention="kmct"))
    model, _ = load_model(write_official(tmp_path / "o.pth", wrapped, None), config)
    for ours, theirs in zip(model.state_dict().values(), kmct.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_known_mask_a_configuration_is_needed(tmp_path, state):
    for mask in (None, "of another kind"):
        config = official_config()
        del config["MODEL"]["MASK_MODE"]
        if mask:
            config["MODEL"]["MASK_MODE"] = mask
        path = write_official(tmp_path / "o.pth", state, config)
        with pytest.raises(
            CheckpointError, match=r"o\.pth: .* does not say which mask it has; .* convert FILE OUT --model.attention"
        ):
            load_model(path)
        load_model(path, Config(model=small_model(vision=VISION, text=TEXT, layers=1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "kmt"}, "model.attention is 'kmct' there, 'kmt' here"),
        ({"placement": "interleave"}, "model.placement is 'append' there, 'interleave' here"),
        ({"layers": 2}, "model.layers is 1 there, 2 here"),
        ({"temporal_embedding": False}, "model.temporal_embedding is True there, False here"),
        ({"window": 2}, "model.window is None there, 2 here"),
        ({"quick_gelu": False}, "model.quick_gelu is True there, False here"),
        ({"vision": VISION | {"head_width": 32}}, "model.vision.head_width is 64 there, 32 here"),
    ],
)
def test_a_contradiction_with_the_configuration_names_both_values(tmp_path, state, change, message):
    path = write_official(tmp_path / "o.pth", state, official_config())
    config = Config(model=small_model(**({"vision": VISION, "text": TEXT, "attention": "kmct"} | change)))
    with pytest.raises(CheckpointError, match=message):
        load_model(path, config)


def test_a_contradiction_can_be_forced(tmp_path, state):
    path = write_official(tmp_path / "o.pth", state, official_config())
    config = Config(model=small_model(vision=VISION, text=TEXT, attention="kmt"))
    model, _ = load_model(path, config, force=True)
    video = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        first, changed = (model.frame_features(clip)[0, 0] for clip in (video, video.flip(1).roll(1, dims=1)))
    assert not torch.equal(first, changed)  # under KMCT the first frame, which is the same, sees no other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DATA": {"NUM_FRAMES": 8}}, "NUM_FRAMES 8, its temporal embedding has 4 frames"),
        (
            {"MODEL": {"ARCH": "ViT-B/16", "MASK_MODE": "kmt"}},
            "ARCH 'ViT-B/16', its weights are of another model: 3 la",
        ),
        ({"TEMPORAL": {"MASK_MODE": "kmt"}}, "contradicts itself: MASK_MODE is 'KMCT' and 'kmt'"),
    ],
)
def test_a_configuration_that_contradicts_its_weights_or_itself_is_refused(tmp_path, state, change, message):
    path = write_official(tmp_path / "o.pth", state, official_config() | change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("arch", "name", "width", "layers", "patch", "image", "text_width", "dim"),
    [
        ("ViT-B/32", "ViT-B-32", 768, 12, 32, 224, 512, 512),
        (None, "ViT-B-16", 768, 12, 16, 224, 512, 512),
        ("ViT-L/14", "ViT-L-14", 1024, 24, 14, 224, 768, 768),
        ("ViT-L/14@336px", "ViT-L-14-336", 1024, 24, 14, 336, 768, 768),
    ],
)
def test_the_authors_models_are_known_by_their_sizes(arch, name, width, layers, patch, image, text_width, dim):
    def empty(*shape):
        return torch.empty(shape, device="meta")

    state = {
        "visual.conv1.weight": empty(width, 3, patch, patch),
        "visual.positional_embedding": empty((image // patch) ** 2 + 1, width),
        "visual.proj": empty(width, dim),
        "visual.temporal_embedding": empty(1, 16, width),
        "token_embedding.weight": empty(49408, text_width),
        "positional_embedding": empty(77, text_width),
    }
    state |= {f"visual.transformer.resblocks.{i}.ln_1.weight": empty(width) for i in range(layers)}
    state |= {f"visual.transformer_t.resblocks.{i}.temporal_ln_1.weight": empty(width) for i in range(layers // 3)}
    state |= {f"transformer.resblocks.{i}.ln_1.weight": empty(text_width) for i in range(12)}
    config = official_config("KMT", 16, arch)
    if arch is None:
        del config["MODEL"]["ARCH"]
    found = from_dict(describe_official(state, config))
    assert (found.model.name, found.model.vision, found.model.text) == (name, None, None)
    assert (found.model.frames, found.model.layers, found.model.attention) == (16, layers // 3, "kmt")
    assert (found.augment.size, found.augment.short_side) == (image, {224: 256, 336: 384}[image])


def test_other_frames_are_refused_or_interpolated_and_said(tmp_path, state, kmct):
    path = write_official(tmp_path / "o.pth", state, official_config())
    config = Config(model=small_model(vision=VISION, text=TEXT, attention="kmct", frames=8))
    with pytest.warns(
        UserWarning, match=r"o\.pth: was trained on 4 frames and gets 8: its temporal embedding is inter"
    ):
        model, _ = load_model(path, config, force=True)
    assert model.clip.visual.temporal_encoder.embedding.weight.shape[1] == 8
    with pytest.raises(CheckpointError, match=r"model\.frames is 4 there, 8 here"):
        load_model(path, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(path)


# ---- hostile pickles ----------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments, state)

    def __reduce__(self):
        return self.parts


def test_a_configuration_is_not_executed(tmp_path, state):
    commands = {
        "a": Call(os.system, f"touch {tmp_path / 'executed'}"),
        "b": Call(eval, f"open({str(tmp_path / 'executed')!r}, 'w')"),
        "MODEL": {"ARCH": Call(os.system, f"touch {tmp_path / 'executed'}"), "MASK_MODE": "kmct"},
    }
    path = write_official(tmp_path / "o.pth", state, commands)
    load_model(path)  # its plain values count, the rest is inert
    assert find_settings(read_pickle(path), "MASK_MODE") == ["kmct"]
    assert not (tmp_path / "executed").exists()
    torch.save(Call(os.system, f"touch {tmp_path / 'executed'}"), tmp_path / "bare.pth")
    torch.load(tmp_path / "bare.pth", weights_only=False)
    assert (tmp_path / "executed").exists()  # so it would have been


def test_a_pickle_does_not_change_torch(tmp_path):
    rebuild = torch._utils._rebuild_tensor_v2
    before = rebuild.__defaults__
    evil = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__K\x07\x85stb."
    (tmp_path / "o.pth").write_bytes(evil)
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_pickle(tmp_path / "o.pth")
    assert rebuild.__defaults__ is before
    pickle.loads(evil)
    changed, rebuild.__defaults__ = rebuild.__defaults__, before
    assert changed == (7,)  # so it would have been


def test_cyclic_deep_and_repeated_configurations_take_no_time(tmp_path, state):
    cyclic = {"MASK_MODE": "kmct"}
    cyclic["itself"] = [cyclic]
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    doubled = {"MASK_MODE": "kmct"}
    for _ in range(100):
        doubled = {"a": doubled, "b": doubled}  # 2 ** 100 paths
    for node in (cyclic, deep, doubled):
        start = time.perf_counter()
        find_settings(node, "MASK_MODE")
        assert time.perf_counter() - start < 5
    assert find_settings(cyclic, "MASK_MODE") == find_settings(doubled, "MASK_MODE") == ["kmct"]
    content = {"model": state, "config": cyclic}
    torch.save(content, tmp_path / "o.pth")
    assert load_checkpoint(tmp_path / "o.pth")["config"]["model"]["attention"] == "kmct"


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".",  # a place in the memo that would take 32 GB
        b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a.",  # a text of so many bytes
        b"\x80\x02" + b"]" * 10 + b"a" * 200 + b".",
        b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.",
    ],
    ids=["memo", "text", "stack", "command"],
)
def test_malformed_pickles_are_refused_at_once(tmp_path, body):
    (tmp_path / "o.pth").write_bytes(body)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"o\.pth: "):
        load_checkpoint(tmp_path / "o.pth")
    assert time.perf_counter() - start < 5


def test_a_program_is_no_checkpoint(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(CheckpointError, match=r"program\.pt: .*it is a TorchScript program"):
        load_checkpoint(tmp_path / "program.pt")
