"""Vision transformers of Hugging Face `transformers`, and the models around them (CLIP, classifiers).

SigLIP 2 pads the patches of a frame; the image blocks and the head ignore the padding, temporal attention does not.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kronmask.clips import Clips
from kronmask.mask import KronMask
from kronmask.nn import AttentionOrGroups
from kronmask.patch.family import Entry, Family
from kronmask.patch.settings import Settings
from kronmask.patch.temporal import heads_module
from kronmask.patch.video import VideoEncoder, refuse_dropout, swap_class

__all__ = ["HuggingFaceEncoder", "MaskedAutoencoder", "find", "from_pretrained"]

_LAYERS = ("layers", "encoder.layer", "encoder.layers", "model.layer", "layer")  # by release
_ENCODERS = {
    "ViTModel", "DeiTModel", "BeitModel", "ViTMAEModel", "ViTMSNModel", "IJepaModel",
    "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel",
    "CLIPVisionModel", "CLIPVisionTransformer", "MetaClip2VisionModel", "MetaClip2VisionTransformer",
    "SiglipVisionModel", "SiglipVisionTransformer", "Siglip2VisionModel", "Siglip2VisionTransformer",
}  # fmt: skip


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention `(B*T, H, N, D)` to `(B*T, N, H, D)`; the model's own mask hides nothing where it was given none."""
    scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
    return output.transpose(1, 2).contiguous(), None


_ATTEND = "kronmask"
ALL_ATTENTION_FUNCTIONS[_ATTEND] = _attend  # type: ignore[index]


class HuggingFaceEncoder(VideoEncoder):
    """Mixin of a patched encoder of Hugging Face: what it has beyond the image class."""

    temporal_configs: list[Any]  # the configurations that hold the settings

    def _prepare(self, video: Tensor, clips: Clips, kwargs: dict[str, Any]) -> dict[str, Any]:
        config: Any = self.config
        if self.temporal_encoder.replaced:
            asked = [name for name in ("attention_mask", "head_mask") if kwargs.get(name) is not None]
            asked += ["output_attentions"] if kwargs.get("output_attentions") or config.output_attentions else []
            if asked:
                raise ValueError(
                    "placement='replace' attends over the clip, by a kernel that computes no weights: leave "
                    f"{asked[0]} out, or use placement='append' or 'interleave'"
                )
        return super()._prepare(video, clips, kwargs)

    def _on_patch(self, model: Any, settings: Settings) -> None:
        """Write the settings into the configuration that `save_pretrained` stores."""
        attention: Any = settings.attention
        several = isinstance(attention, (list, tuple))
        attention = [_storable(mask) for mask in attention] if several else _storable(attention)
        layers = settings.layers
        layers = layers if layers is None or isinstance(layers, int) else list(layers)
        stored = vars(settings) | {"attention": attention, "layers": layers}
        # a CLIP is read whole, and its vision model alone; in some releases that model has a copy of its configuration
        self.temporal_configs = [self.config, model.config, getattr(model.config, "vision_config", model.config)]
        for config in self.temporal_configs:
            config.kronmask = stored

    def _on_unpatch(self, model: Any) -> None:
        for config in self.temporal_configs:
            vars(config).pop("kronmask", None)
        del self.temporal_configs

    def _prepare_replaced(self, block: nn.Module) -> None:
        """Let the block attend by `_attend`, whatever the model's `attn_implementation` is, or becomes."""
        attn = heads_module(block)
        attn.temporal_config = attn.config
        attn.config = copy.deepcopy(attn.config)
        attn.config._attn_implementation = _ATTEND

    def _restore_replaced(self, block: nn.Module) -> None:
        attn = heads_module(block)
        attn.config = vars(attn).pop("temporal_config")


class MaskedAutoencoder(HuggingFaceEncoder):
    """Mixin of a patched `ViTMAEModel`: the same patches are masked in all frames of a clip."""

    def _prepare(self, video: Tensor, clips: Clips, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("noise") is None:
            embeddings: Any = self.embeddings
            height, width = embeddings.patch_embeddings.patch_size
            patches = (video.shape[3] // height) * (video.shape[4] // width)
            count = clips.count(video.shape[0] * video.shape[1])
            kwargs["noise"] = torch.rand(count, patches, device=video.device)
        return super()._prepare(video, clips, kwargs)

    def _encode(
        self, entry: Entry, output: str, images: Any, args: Any, kwargs: dict[str, Any], clips: Clips | None = None
    ) -> Any:
        result = super()._encode(entry, output, images, args, kwargs, clips)
        if output == "mean" and isinstance(result, Mapping):
            return type(result)(**dict(result, ids_restore=_of_clips(result["ids_restore"])))
        if output == "mean":
            return (*result[:2], _of_clips(result[2]), *result[3:])  # last_hidden_state, mask, ids_restore, ...
        return result


def _of_clips(value: Tensor | list[Tensor]) -> Tensor:
    """`(B, ...)` of what is equal in all frames of a clip: `(B, T, ...)`, or a list of a `(T, ...)` for each clip."""
    return value[:, 0] if isinstance(value, Tensor) else torch.stack([clip[0] for clip in value])


# ---- finding the encoder --------------------------------------------------------------------------------------------


def find(model: nn.Module) -> tuple[nn.Module, Family]:
    """The vision transformer in a model of Hugging Face, and its family.

    Raises:
        TypeError: there is none, or the model does with it what has no meaning for clips.
    """
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    found = {path: module for path, module in model.named_modules() if _path(module)}
    if len(found) != 1:
        raise TypeError(f"patch_vit cannot patch {name}: {_reason(model, len(found))}")
    path, encoder = next(iter(found.items()))
    if encoder is not model and _is_dense(model):
        raise TypeError(
            f"patch_vit cannot patch {name}: it is made for the patches or the hidden states of one image; patch its "
            f"encoder alone, model.{path}"
        )
    return encoder, _family(encoder)


def _known(module: nn.Module) -> str | None:
    """The class of a known encoder that a module is of, if any."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _ENCODERS), None)


def _path(module: Any) -> str | None:
    """Where the blocks of a known encoder are in this release of transformers; None for other modules."""
    if _known(module) is None:
        return None
    for path in _LAYERS:
        blocks = module
        for name in path.split("."):
            blocks = getattr(blocks, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return path
    return None


def _is_dense(model: Any) -> bool:
    """Whether a model takes more from its encoder than the final tokens, or gives an output for each patch."""
    name = next(cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    return bool(re.search("For(?!ImageClassification)", name)) or hasattr(model.config, "vision_feature_layer")


def _reason(model: Any, count: int) -> str:
    config = getattr(model, "config", None)
    if count:
        return f"it has {count} vision transformers; pass one of them"
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        return "it takes no images"
    if type(model).__name__.endswith("Backbone"):
        return "its outputs are maps over the patches of one image; use the model without Backbone in its name"
    if any(isinstance(getattr(config, name, None), (list, tuple)) for name in ("depths", "hidden_sizes", "depth")):
        return "it is convolutional or hierarchical: the grid or the width of its tokens changes between stages"
    return (
        f"it is none of the vision transformers that are known ({', '.join(sorted(_ENCODERS))}); declare it with "
        "family=kronmask.patch.Family(...)"
    )


def _family(encoder: nn.Module) -> Family:
    known = _known(encoder) or ""
    return Family(
        type(encoder),
        _path(encoder) or "layers",
        entries=(Entry("forward", ndim=3 if known.startswith("Siglip2") else 4),),
        per_image=("bool_masked_pos", "noise", "attention_mask", "pixel_attention_mask", "spatial_shapes"),
        cannot_replace=_cannot_replace,
        cannot_copy=_cannot_copy,
        base=MaskedAutoencoder if known == "ViTMAEModel" else HuggingFaceEncoder,
    )


_BIAS = "a bias for the relative position in the frame is added to the scores of attention"


def _has_bias(config: Any) -> bool:
    names = ("use_relative_position_bias", "use_shared_relative_position_bias")
    return any(getattr(config, name, False) for name in names)


def _cannot_replace(encoder: Any, block: Any) -> str | None:
    if _has_bias(encoder.config):
        return _BIAS
    if (_known(encoder) or "").startswith("Siglip2"):
        return "it masks the padding of a frame in the scores of attention"
    attn = heads_module(block)
    drop = getattr(attn, "dropout", 0.0)  # of attention weights, where it is the attention's own
    refuse_dropout(drop.p if isinstance(drop, nn.Dropout) else drop)
    forward: Any = inspect.unwrap(type(attn).forward)
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names and "Sdpa" not in type(attn).__name__:
        return (
            f"{type(attn).__name__} computes the weights of attention; load the model with attn_implementation='sdpa'"
        )
    return None


def _cannot_copy(encoder: Any, block: Any) -> str | None:
    if _known(encoder) == "DINOv3ViTModel":
        return "their attention rotates queries and keys by position"
    return _BIAS if _has_bias(encoder.config) else None


# ---- files ----------------------------------------------------------------------------------------------------------


def from_pretrained(
    model_class: type[Any], path: Any, *, attention: AttentionOrGroups | None = None, **kwargs: Any
) -> Any:
    """Load a patched model that `save_pretrained` has written, patched as it was.

    Args:
        model_class: the model's class, as for an image model: `ViTForImageClassification`.
        path: what `model_class.from_pretrained` takes.
        attention: the mask, for a model that was patched with a function; otherwise the file knows it.
        kwargs: passed on to `model_class.from_pretrained`.

    Raises:
        TypeError: `model_class` is no class of models (`AutoModel` is none).
        ValueError: the configuration tells of no patch, or of a mask that was a function and is not given.
    """
    from kronmask.patch import patch_vit

    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TypeError(
            f"model_class must be the class of the model, as ViTForImageClassification, not {model_class!r}"
        )

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        swap_class(self, model_class)
        stored = getattr(config, "kronmask", None) or getattr(find(self)[0].config, "kronmask", None)
        if not stored:
            raise ValueError(
                f"{path} was not written by a model of patch_vit; use {model_class.__name__}.from_pretrained"
            )
        mask = _stored_mask(stored["attention"]) if attention is None else attention
        if mask is None:
            raise ValueError(f"the mask of {path} was a function, which no file holds; pass it as attention=")
        patch_vit(self, **stored | {"attention": mask, "init": "zero"})  # the file has the weights
        config.kronmask["init"] = stored["init"]

    # from_pretrained makes the model, with no memory for weights, and then loads them: the temporal ones must be there
    members = {"__init__": build, "__module__": model_class.__module__}
    patching: Any = type(model_class.__name__, (model_class,), members)
    return patching.from_pretrained(path, **kwargs)


def _storable(attention: Any) -> Any:
    """A mask as a configuration can hold it: None for a function, which `from_pretrained` asks for."""
    if isinstance(attention, KronMask):
        return {"rule": attention.rule, "frames": attention.num_frames, "tokens": attention.num_tokens}
    return attention if isinstance(attention, str) else None


def _stored_mask(stored: Any) -> AttentionOrGroups | None:
    """The mask that a configuration holds: a name, the rule of a `KronMask`, a list of these, or None for a function."""
    if isinstance(stored, list):
        found: list[Any] = [_stored_mask(mask) for mask in stored]
        return None if None in found else found
    if not isinstance(stored, dict):
        return stored
    frames, tokens = stored["frames"], stored["tokens"]
    return KronMask.from_rule(stored["rule"], frames=(frames, frames), tokens=(tokens, tokens), prefix=0)
