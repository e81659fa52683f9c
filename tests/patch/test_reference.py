"""Every family against the plain second implementation of `plain.py`: outputs and gradients."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import plain
import pytest
import torch
from models import CASES, FRAMES, blocks, clips, encode, image_model, stir
from torch import Tensor, nn

from kronmask import patch_vit, temporal_parameters

LAYERS: dict[str, Any] = {"append": 2, "interleave": [0, 2], "replace": [0, 2]}
"""Two temporal layers, or two of three blocks: a layer that is there once too often, or one block further, is seen."""


def like(name: str, model: nn.Module) -> dict[str, nn.Module]:
    return {key: attrgetter(path)(blocks(name, model)[-1]) for key, path in CASES[name].like.items()}


@pytest.mark.parametrize(
    ("attention", "embedding"),
    [("kmt", True), ("kmct", "rotary"), (["kmct", "temporal", "kmt"], False)],
    ids=["kmt", "kmct-rotary", "groups of heads"],
)
@pytest.mark.parametrize("placement", ["append", "interleave", "replace"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_plain_implementation(
    name: str, placement: str, attention: Any, embedding: Any
) -> None:
    if placement == "replace" and not CASES[name].replace:
        with pytest.raises(TypeError, match="placement='replace' cannot serve"):
            patch_vit(image_model(name), placement=placement, family=CASES[name].family)
        return
    if isinstance(attention, list):
        attention = attention[: next(count for count in (2, 3, 1) if CASES[name].heads % count == 0)]
    if placement == "replace":  # in which a frame must see itself
        see_itself = {"kmt": "joint", "kmct": "causal", "temporal": "spatial"}
        several = isinstance(attention, list)
        attention = [see_itself[mask] for mask in attention] if several else see_itself[attention]
    dtype = torch.float32 if name == "clip" else torch.float64  # OpenAI's norms compute in float32
    image, video = image_model(name).to(dtype), clips(name).to(dtype)
    model = patch_vit(
        image_model(name).to(dtype),
        placement=placement,
        attention=attention,
        frames=FRAMES,
        layers=LAYERS[placement],
        init="random",
        temporal_embedding=embedding,
        family=CASES[name].family,
    )
    stir(model)
    temporal = {k.rpartition("temporal_encoder.")[2]: p for k, p in temporal_parameters(model).items()}
    weights = {k: p.detach().clone().requires_grad_() for k, p in temporal.items()}

    expected = plain.run(
        image,
        lambda model, frames: encode(name, model, frames),
        blocks(name, image),
        video,
        weights,
        attention=attention,
        placement=placement,
        layers=() if placement == "append" else LAYERS[placement],
        heads=CASES[name].heads,
        like=like(name, image),
        batch_dim=int(CASES[name].sequence_first),
        rotary=embedding == "rotary",
    )
    actual = encode(name, model, video)
    # some models compute their positions in float32 in any case
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-7, 1e-8)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

    sum(output.square().sum() for output in expected).backward()
    sum(output.square().sum() for output in actual).backward()
    assert_same_gradients(
        {key: parameter.grad for key, parameter in temporal.items()},
        {key: parameter.grad for key, parameter in weights.items()},
        rtol,
    )
    patched = dict(model.named_parameters())
    assert_same_gradients(
        {key: patched[key].grad for key, _ in image.named_parameters()},
        {key: parameter.grad for key, parameter in image.named_parameters()},
        rtol,
    )


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], rtol: float) -> None:
    """Equal up to rounding, which is relative to the largest gradient: those of key biases are zero in theory."""
    scale = max((grad.abs().max().item() for grad in expected.values() if grad is not None), default=0.0)
    for key, grad in expected.items():
        assert (actual[key] is None) == (grad is None), key
        if grad is not None:
            torch.testing.assert_close(
                actual[key], grad, rtol=rtol, atol=rtol * scale, msg=lambda text, key=key: f"{key}: {text}"
            )
