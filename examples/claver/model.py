"""CLAVER's model: an open_clip CLIP whose vision tower is patched, and logits between clips and prompts."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronmask import masks, patch_vit, temporal_parameters
from kronmask.nn import MLP, KronAttention

from .config import Config, ModelConfig
from .text import FrozenTexts, StepTexts

__all__ = ["Claver", "build_model", "describe_trained", "freeze", "torch_defaults"]


class Claver(nn.Module):
    """Contrastive logits of videos against text prompts (CLAVER, arXiv 2502.03549, section 3).

    Each frame's feature is normalised and the mean over frames is the video's; it is not normalised again.
    """

    clip: Any  # an open_clip.CLIP or CustomTextCLIP with a patched vision tower

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        # of a model `from_pretrained`: what it was trained as
        self.config: Config | None = None
        self.classes: list[str] = []
        self.prompts: list[list[str]] = []

    @staticmethod
    def from_pretrained(name: str | Path, *, revision: str | None = None) -> Claver:
        """A model of the Hugging Face Hub, or of a folder, as `hub.from_pretrained`."""
        from .weights.hub import from_pretrained

        return from_pretrained(name, revision=revision)

    def encode_video(self, video: Tensor) -> Tensor:
        """Features `(B, E)` of normalised clips `(B, T, 3, H, W)`."""
        return F.normalize(self.frame_features(video).float(), dim=-1).mean(1)

    def frame_features(self, video: Tensor) -> Tensor:
        """Features `(B, T, E)` of each frame, before normalisation."""
        return self.clip.visual.forward_frames(video)

    def encode_text(self, tokens: Tensor | StepTexts | FrozenTexts) -> Tensor:
        """Normalised features `(A, C, E)` of tokenized prompts `(A, C, context)`, or of the texts of a training step."""
        if not isinstance(tokens, Tensor):
            return tokens.encode(self.clip)
        features = self.clip.encode_text(tokens.flatten(0, -2)).float()
        return F.normalize(features, dim=-1).unflatten(0, tokens.shape[:-1])

    def logits(self, video_features: Tensor, text_features: Tensor) -> Tensor:
        """`(B, A, C)` float32 from `(B, E)` and `(A, C, E)`, also under autocast: scaled by 100, bfloat16 cosines would tie."""
        with torch.autocast(video_features.device.type, enabled=False):
            cosines = torch.einsum("be,ace->bac", video_features.float(), text_features.float())
            return self.clip.logit_scale.float().exp() * cosines

    def forward(self, video: Tensor, tokens: Tensor | StepTexts | FrozenTexts) -> Tensor:
        """Logits `(B, A, C)` of clips `(B, T, 3, H, W)` against prompts `(A, C, context)`, or the texts of a training step."""
        return self.logits(self.encode_video(video), self.encode_text(tokens))


def build_model(config: ModelConfig) -> Claver:
    """The model that `config` describes, on the CPU.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip does not know the model or its weights, or cannot get them.
    """
    try:
        import open_clip
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        raise ImportError("CLAVER needs open_clip: pip install 'kronmask[claver]'") from error
    if config.vision is not None:
        vision, text = CLIPVisionCfg(**config.vision), CLIPTextCfg(**(config.text or {}))
        clip: Any = open_clip.CLIP(config.embed_dim, copy.deepcopy(vision), text, quick_gelu=config.quick_gelu)
    else:
        try:
            clip = open_clip.create_model(config.name, pretrained=config.pretrained, force_quick_gelu=config.quick_gelu)
        except RuntimeError as error:  # an unknown name, a download that failed, a file of another model
            weights = f" with the weights {config.pretrained}" if config.pretrained else ""
            raise ValueError(f"open_clip cannot make {config.name}{weights}: {error}") from error
    windowed = config.window is not None or config.sink
    mask = (
        partial(masks.NAMES[config.attention], window=config.window, sink=config.sink) if windowed else config.attention
    )
    patch_vit(
        clip,
        frames=config.frames,
        attention=mask,
        placement=config.placement,
        layers=config.layers,
        init="random" if config.init == "torch" else config.init,
        temporal_embedding=config.temporal_embedding,
    )
    if config.init == "torch":
        torch_defaults(clip.visual.temporal_encoder)
    initial = {"visual.positional_embedding": config.position_std, "token_embedding.weight": config.token_std}
    if config.token_std is not None:
        initial["positional_embedding"] = config.token_std / 2  # of the text; CLIP's own ratio
    if config.temporal_embedding is True:
        initial["visual.temporal_encoder.embedding.weight"] = config.temporal_std
    for name, std in initial.items():
        if std is not None:
            nn.init.normal_(clip.get_parameter(name), std=std)
    if config.logit_scale is not None:
        nn.init.constant_(clip.logit_scale, math.log(config.logit_scale))
    return Claver(clip)


def torch_defaults(module: nn.Module) -> None:
    """Give temporal layers the initial values that torch gives `nn.MultiheadAttention` and `nn.Linear`, as the authors do.

    CLIP's own are others: for 768 channels the standard deviations of its attention are .0361 (input) and .0255 or less (output,
    by the number of blocks), torch's .0255 and .0208; and torch's biases of the MLP are random.
    """
    for layer in module.modules():
        if isinstance(layer, KronAttention):
            layer.out_proj.reset_parameters()
            nn.init.xavier_uniform_(layer.in_proj_weight)
            for bias in (layer.in_proj_bias, layer.out_proj.bias):
                if bias is not None:
                    nn.init.zeros_(bias)
        elif isinstance(layer, MLP):
            layer.c_fc.reset_parameters()
            layer.c_proj.reset_parameters()


def freeze(model: Claver, tune: str) -> None:
    """Leave to be trained: `"full"` all, the text tower included; `"vision"` the image tower with its temporal parameters;
    `"temporal"` these alone."""
    temporal = set(temporal_parameters(model))
    for name, parameter in model.named_parameters():
        part = name in temporal or (tune == "vision" and ".visual." in name)
        parameter.requires_grad_(tune == "full" or part)


def describe_trained(model: Claver) -> str:
    """Which parts are trained, in millions of parameters: nobody should have to guess."""
    parts: dict[str, list[int]] = {}
    temporal = temporal_parameters(model)
    for name, parameter in model.named_parameters():
        part = "temporal" if name in temporal else "vision" if ".visual." in name else "text"
        counts = parts.setdefault(part, [0, 0])
        counts[0] += parameter.numel() * parameter.requires_grad
        counts[1] += parameter.numel()
    trained, total = (sum(counts[i] for counts in parts.values()) for i in (0, 1))
    listed = ", ".join(f"{part} {counts[0] / 1e6:.1f}M of {counts[1] / 1e6:.1f}M" for part, counts in parts.items())
    return f"training {trained / 1e6:.1f}M of {total / 1e6:.1f}M parameters ({listed})"
