"""An image encoder that takes video: its frames go through its own code as a batch, and its blocks know the clip.

A patched encoder, its blocks and its patch dropout have classes made here, which inherit from the image classes. Classes, not
closures on `forward`: copies, pickles and averaged models keep working.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from kronmask.clips import Clips, PackedClips
from kronmask.nn import MaskRule, attend_in_groups, rotate_by_time
from kronmask.patch.family import Entry, Family
from kronmask.patch.settings import Settings
from kronmask.patch.temporal import Place, TemporalEncoder, build_temporal_encoder

__all__ = ["VideoEncoder", "patch_encoder", "unpatch_encoder"]


# ---- the clip that is being encoded ---------------------------------------------------------------------------------


class _Running(threading.local):
    """The encoder that is running in this thread, its B*T images and their clips, the block that has run last, and where it
    leaves its last tokens."""

    def __init__(self) -> None:
        # not attributes of the class, which torch.compile of 2.7 takes for the values of every thread
        self.encoder: nn.Module | None = None
        self.images = 0
        self.clips = Clips(1)
        self.block: int | None = None
        self.tokens: list[Tensor] | None = None
        self.grad = False  # whether gradients were on where the encoder was called


_running = _Running()


def _clips_of(encoder: Any, images: int) -> Clips:
    """The clips whose B*T frames a block has before it.

    Within the encoder's forward they are known. When activation checkpointing runs a block again in the backward, they are those
    of the forward whose output the backward has come from. A backward from elsewhere (an activation that a hook has kept),
    while a forward with as many images in clips of another length is pending, meets torch's check of recomputed shapes, which
    the reentrant kind of checkpointing does not make.
    """
    if _running.encoder is encoder:
        if images != _running.images:
            raise ValueError(
                f"a block of {type(encoder).__name__} got {images} images of the {_running.images} that all frames of all clips "
                "are; are its tokens (N, B, D)? Then its family has sequence_first=True"
            )
        return _running.clips
    clips = encoder.temporal_encoder.clips.get(images)
    in_backward = torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1
    if clips is None or not in_backward:
        raise RuntimeError(
            f"a block of a patched {type(encoder).__name__} was called on {images} images outside of the model's forward, so it "
            "cannot know their clips; call the model, or unpatch_vit(model) first"
        )
    return clips


class Link:
    """The encoder of a module, and a block's place in it; not a module, so that the encoder is no child of its own blocks."""

    def __init__(self, encoder: nn.Module, place: Any = None) -> None:
        self.encoder = encoder
        self.place = place  # of a block

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        """A block that is copied without its encoder stays a block of that encoder."""
        return Link(memo.get(id(self.encoder), self.encoder), self.place)


# ---- classes made from image classes --------------------------------------------------------------------------------

_made: dict[tuple[type, type, Family | None], type] = {}


class Patched(nn.Module):
    """Mixin of every patched module; its class is made from the image class and remembers it."""

    image_class: type[nn.Module]
    family: Family | None

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = next((cls for cls in type(self).__mro__ if "patched_by" in vars(cls)), None)
        if cls is None or cls is not type(self):  # a class that something else made on top of ours rebuilds itself
            return super().__reduce_ex__(protocol)
        state = super().__reduce_ex__(max(2, protocol))[2:]
        return _rebuild, (vars(cls)["patched_by"], cls.image_class, cls.family), *state  # type: ignore[attr-defined]


def patched_class(mixin: type[Patched], image_class: type[nn.Module], family: Family | None = None) -> type[Any]:
    """The class that an instance of `image_class` gets; one for each, so that equal models have equal types."""
    if (mixin, image_class, family) not in _made:
        members: dict[str, Any] = {"image_class": image_class, "patched_by": mixin, "family": family}
        # the image class's name: training frameworks find what they know of a layer by it
        members |= {"__module__": image_class.__module__, "__qualname__": image_class.__qualname__}
        members["__doc__"] = f"`{image_class.__name__}` patched by `patch_vit`."
        if issubclass(mixin, VideoBlock):
            members["forward"] = _block_forward(image_class)
        if family is not None:
            members |= {entry.method: _entry_method(entry, image_class, family) for entry in family.entries}
            members |= {name: _refusing(name, reason) for name, reason in family.refused if hasattr(image_class, name)}
        make: Any = type
        made = make(image_class.__name__, (mixin, image_class), members)
        _made[mixin, image_class, family] = made
    return _made[mixin, image_class, family]


def _rebuild(mixin: type[Patched], image_class: type[nn.Module], family: Family | None) -> Any:
    cls: Any = patched_class(mixin, image_class, family)
    return cls.__new__(cls)


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, in place."""
    module.__class__ = cls  # type: ignore[assignment]


# ---- blocks ---------------------------------------------------------------------------------------------------------


class VideoBlock(Patched):
    """Mixin of an image block that runs the temporal layers in front of it and behind it, or attends over the clip itself."""

    temporal_link: Link


def _block_forward(image_class: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a patched block: `(B*T, N, D)`, `(B*T, H, W, D)` or, sequence first, `(N, B*T, D)` to the same."""
    name = list(inspect.signature(image_class.forward).parameters)[1]

    @wraps(image_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, args = (args[0], args[1:]) if args else (kwargs.pop(name), args)
        encoder = self.temporal_link.encoder
        place: Place = self.temporal_link.place
        temporal: TemporalEncoder = encoder.temporal_encoder
        batch_dim = 1 if type(encoder).family.is_sequence_first(encoder) else 0
        clips = _clips_of(encoder, x.shape[batch_dim])

        if _running.encoder is encoder and _running.grad and not torch.is_grad_enabled() and not x.requires_grad:
            _refuse_reentrant(temporal, place)

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            x = _on_tokens(temporal.before, place, x, clips, batch_dim)
            if place.replaced:
                assert temporal.mask is not None
                attention = ClipAttention(x.shape[batch_dim], clips, temporal.mask, temporal.rotary)
                with attention:
                    output = image_class.forward(self, x, *args, **kwargs)
                attention.check(image_class)
            else:
                output = image_class.forward(self, x, *args, **kwargs)
            rest = output[1:] if isinstance(output, tuple) else None
            tokens = _on_tokens(temporal.after, place, output if rest is None else output[0], clips, batch_dim)
            return tokens if rest is None else (tokens, *rest)

        if temporal.checkpointing and torch.is_grad_enabled():
            output = checkpoint(run, x, *args, use_reentrant=False, **kwargs)
        else:
            output = run(x, *args, **kwargs)
        if _running.encoder is encoder:
            if not torch.compiler.is_compiling():  # a compiled block leaves no trace
                _running.block = place.index
            if place.last and _running.tokens is not None:
                tokens = output[0] if isinstance(output, tuple) else output
                tokens = tokens.transpose(0, 1) if batch_dim else tokens
                _running.tokens.append(clips.by_clip(tokens.flatten(1, -2)))
        return output

    return forward


def _refuse_reentrant(temporal: TemporalEncoder, place: Place) -> None:
    """Raises RuntimeError in a block without gradients (as in a reentrant checkpoint) whose temporal layers are to learn."""
    layers = temporal.layers_at(place)
    if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
        raise RuntimeError(
            "reentrant activation checkpointing of a frozen image model gives its temporal layers no gradient; use the other "
            "kind: gradient_checkpointing_enable({'use_reentrant': False}) of Hugging Face, or set_grad_checkpointing() of the "
            "patched encoder"
        )


def _on_tokens(layers: Callable[..., Tensor], place: Place, x: Tensor, clips: Clips, batch_dim: int) -> Tensor:
    """Run temporal layers on tokens in a block's own layout, in the layout `(B*T, N, D)`."""
    if batch_dim:
        return layers(place, x.transpose(0, 1), clips).transpose(0, 1)
    if x.ndim == 3:
        return layers(place, x, clips)
    return layers(place, x.flatten(1, -2), clips).unflatten(1, x.shape[1:-1])


class ClipAttention(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` over a frame's tokens is attention over the clip's, under a mask.

    All else in the block's attention stays its own: projections, norms and rotations of queries and keys (which depend on the
    position in the frame alone, and so also hold between frames), gates, output.
    """

    def __init__(self, images: int, clips: Clips, mask: MaskRule, rotary: bool) -> None:
        super().__init__()
        self.images = images
        self.clips = clips
        self.mask = mask
        self.rotary = rotary
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`(B*T, H, N, D)` to `(B*T, H, N, D)`, within each clip."""
        self.calls += 1
        if attn_mask is not None or is_causal:
            raise ValueError(
                "placement='replace' cannot apply an attention mask or a bias on the scores of the image model "
                f"({'is_causal' if attn_mask is None else f'attn_mask of shape {tuple(attn_mask.shape)}'}); use "
                "placement='append' or 'interleave'"
            )
        refuse_dropout(dropout_p)
        if query.ndim != 4 or query.shape[0] != self.images or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"placement='replace' needs attention of all tokens of a frame to each other, (B*T, heads, N, D) with B*T = "
                f"{self.images}; the block attends from {tuple(query.shape)} to {tuple(key.shape)}"
            )
        clips, tokens, head_dim = self.clips, key.shape[2], key.shape[3]
        query, key, value = (
            x.unflatten(0, (-1, clips.frames)).transpose(1, 2).flatten(2, 3) for x in (query, key, value)
        )  # (B, H, T*N, D)
        if self.rotary:
            times = clips.times(query.device)
            query, key = (rotate_by_time(part, times, tokens) for part in (query, key))
        outputs = [  # values may be a multiple as wide as queries (differential attention)
            attend_in_groups(clips, query, key, part, self.mask, tokens, scale=scale)
            for part in value.split(head_dim, dim=-1)
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output.unflatten(2, (clips.frames, tokens)).transpose(1, 2).flatten(0, 1)

    def check(self, block: type[nn.Module]) -> None:
        """Raises RuntimeError if the block has attended in another way."""
        if not self.calls:
            raise RuntimeError(
                f"{block.__qualname__} has not called scaled_dot_product_attention, so placement='replace' could not make it "
                "attend over the clip; use fused (sdpa) attention, or placement='append' or 'interleave'"
            )


class VideoMultiheadAttention(Patched):
    """`nn.MultiheadAttention` by way of `scaled_dot_product_attention`, which `ClipAttention` can take over."""

    def forward(  # type: ignore[override]
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention`, but for attention weights, which are not computed."""
        if key_padding_mask is not None:
            attn_mask = key_padding_mask
        inputs = [x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]  # (B, N, D)
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(x, weight, bias).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout, is_causal)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), None


def refuse_dropout(probability: float) -> None:
    """Raises ValueError if attention weights are to be dropped, which no fused kernel here does."""
    if probability > 0:
        raise ValueError(
            f"the model has attention dropout {probability}, which placement='replace' cannot apply; set it to 0, or use "
            "placement='append' or 'interleave'"
        )


class TubeDropout(Patched):
    """Mixin of patch dropout that drops the same patches in all frames of a clip, so that a position stays a position.

    Of packed clips it drops the same patches in all: they are one sequence of frames of one size.
    """

    temporal_link: Link

    def forward(self, x: Tensor, *args: Any) -> Any:
        """Frames `(B*T, N, D)`, in training with fewer tokens; kept indices, where the image class returns them."""
        if not self.training:
            return super().forward(x, *args)
        clips = _clips_of(self.temporal_link.encoder, x.shape[0])
        if not clips.whole and getattr(self, "prob", None) != 0:
            raise ValueError(
                f"patch dropout ({type(self).__qualname__}) would drop other patches in each part of a clip; set it to 0 to "
                "train on parts of clips"
            )
        frames = clips.frames
        wide = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2)  # (B, N, T*D)
        output = super().forward(wide, *args)
        kept = output[0] if isinstance(output, tuple) else output
        kept = kept.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)
        if not isinstance(output, tuple):
            return kept
        return kept, *(None if i is None else i.repeat_interleave(frames, 0) for i in output[1:])


# ---- encoders -------------------------------------------------------------------------------------------------------


class VideoEncoder(Patched):
    """Mixin of every patched image encoder: what it has beyond the image class."""

    temporal_encoder: TemporalEncoder
    family: Family

    def forward_frames(self, video: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the image model returns, for each frame: `(B, T, ...)`; their mean over T is `forward(video)`.

        Of a list of clips `(T, C, H, W)`, it is a list of a `(T, ...)` for each clip, also where all have one length.
        """
        return self._encode(self.family.entries[0], "frames", video, args, kwargs)

    def forward_tokens(self, video: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Tokens after the last temporal layer, before what follows the blocks.

        Args:
            video: `(B, T, C, H, W)`, or images `(B, C, H, W)` as clips of one frame, or a list of clips `(T, C, H, W)`.

        Returns:
            `(B, T, N, D)`, or a list of a `(T, N, D)` for each clip; N counts class token and registers, which come where the
            image model has them.
        """
        tokens: list[Tensor] = []
        outer, _running.tokens = _running.tokens, tokens
        try:
            self._encode(self.family.entries[0], "frames", video, args, kwargs)
        finally:
            _running.tokens = outer
        return tokens[0]

    def set_grad_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Recompute blocks, the temporal layers among them, in the backward.

        Not the image model's own way: that may be of the reentrant kind, which gives no gradient to the temporal layers
        where the image model is frozen.
        """
        own = getattr(super(), "set_grad_checkpointing", None)
        if own is not None:
            own(False, *args, **kwargs)
        self.temporal_encoder.checkpointing = bool(enable)

    def no_weight_decay(self) -> set[str]:
        """What an optimizer factory is not to decay: the image model's own, and the temporal embedding."""
        own: Any = getattr(super(), "no_weight_decay", set)()
        return set(own) | {n for n, _ in self.named_parameters() if n.startswith("temporal_encoder.embedding")}

    def _prepare(self, video: Tensor, clips: Clips, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Further arguments for the image method, one row for each frame, from those for the clips of `video`."""
        for name in type(self).family.per_image:  # an attribute of the class to torch.export of 2.7
            if isinstance(value := kwargs.get(name), Tensor):
                kwargs[name] = clips.repeat(value)
        return kwargs

    def _encode(
        self, entry: Entry, output: str, images: Any, args: Any, kwargs: dict[str, Any], clips: Clips | None = None
    ) -> Any:
        """Call a method of the image class on all frames of a batch of clips; `clips` where they are not whole."""
        method = getattr(self.image_class, entry.method)
        if _running.encoder is self:  # called by another entry, on frames
            return method(self, images, *args, **kwargs)
        if args and type(self).family.per_image:  # by name, since `_prepare` looks for them by name
            bound = inspect.signature(method).bind_partial(self, images, *args, **kwargs)
            args, kwargs = (), dict(list(bound.arguments.items())[2 : 2 + len(args)], **kwargs)
        group = self.temporal_encoder.frame_group
        if group is not None:
            group.check(
                images
            )  # before anything that one rank alone could refuse; a list of clips is refused by `_as_video`
        elif clips is None and isinstance(images, (list, tuple)):
            images, clips = _packed(images, entry, self.temporal_encoder.channels)
        video = _as_video(images, entry, self.temporal_encoder.channels)
        if clips is None:
            clips = Clips(video.shape[1]) if group is None else group.clips(video.shape[1])
        count = video.shape[0] * video.shape[1]
        outer = _running.encoder, _running.images, _running.clips, _running.block, _running.grad
        _running.encoder, _running.images, _running.clips, _running.block = self, count, clips, None
        _running.grad = torch.is_grad_enabled()
        try:
            result = method(self, video.flatten(0, 1), *args, **self._prepare(video, clips, dict(kwargs)))
            skipped = _running.block not in (None, self.temporal_encoder.depth - 1)
            if self.temporal_encoder.blocks and skipped:
                raise ValueError(
                    f"{entry.method} has not run the last block, which the temporal blocks of placement='append' follow; let it "
                    "run (no stop_early, no output of an earlier block), or use placement='interleave' or 'replace'"
                )
        finally:
            _running.encoder, _running.images, _running.clips, _running.block, _running.grad = outer
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _note_clips(self.temporal_encoder.clips, count, clips, (result, _running.tokens))
        return _by_clip(result, clips, count, mean=output == "mean")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """Load; a checkpoint without any temporal weight (an image model's) leaves the temporal weights as they are."""
        new = f"{prefix}temporal_encoder."
        if not any(key.startswith(new) for key in state_dict):
            state_dict.update(
                (f"{new}{name}", tensor)
                for name, tensor in self.temporal_encoder.named_parameters(remove_duplicate=False)
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _on_patch(self, model: nn.Module, settings: Settings) -> None:
        """What a family does with the `model` that `patch_vit` was given, once it is patched; `_on_unpatch` undoes it."""

    def _on_unpatch(self, model: nn.Module) -> None:
        """Undo `_on_patch`."""

    def _prepare_replaced(self, block: nn.Module) -> None:
        """What a family changes in an image block for `placement="replace"`; `_restore_replaced` undoes it."""

    def _restore_replaced(self, block: nn.Module) -> None:
        """Undo `_prepare_replaced`."""


def _entry_method(entry: Entry, image_class: type[nn.Module], family: Family) -> Callable[..., Any]:
    image_method = getattr(image_class, entry.method)
    name = list(inspect.signature(image_method).parameters)[1]

    @wraps(image_method)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and name not in kwargs:
            return image_method(self, **kwargs)  # its own complaint
        images, args = (args[0], args[1:]) if args else (kwargs.pop(name), args)
        return self._encode(entry, entry.output, images, args, kwargs)

    return method


def _refusing(name: str, reason: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is not defined for a model patched by kronmask.patch_vit: {reason}")

    return method


def _layout(entry: Entry, channels: int | None) -> tuple[int | None, str]:
    """The channels that an entry is held to, and the dimensions of an image or frame."""
    channels = None if entry.features or entry.ndim != 4 else channels
    return channels, {4: f"{'C' if channels is None else channels}, H, W", 3: "N, D"}[entry.ndim]


def _packed(clips: Sequence[Any], entry: Entry, channels: int | None) -> tuple[Tensor, PackedClips]:
    """A list of clips `(T, C, H, W)` of any lengths as one `(1, sum(T), C, H, W)`.

    Raises:
        TypeError: a clip that is no tensor.
        ValueError: no clip, or one of another shape, dtype or device than a list of clips has; the message says which.
    """
    channels, layout = _layout(entry, channels)
    if not clips:
        raise ValueError(f"the list of clips is empty; a patched model takes at least one clip (T, {layout})")
    for number, clip in enumerate(clips):
        if not isinstance(clip, Tensor):
            raise TypeError(f"clip {number} of the list is no tensor (T, {layout}) but {type(clip).__name__}")
        if clip.ndim != entry.ndim or clip.shape[0] < 1 or channels not in (None, clip.shape[1]):
            raise ValueError(
                f"clip {number} of the list has shape {tuple(clip.shape)}, expected (T, {layout}) with at least one frame"
            )
        frame, first = ((tuple(c.shape[1:]), c.dtype, c.device) for c in (clip, clips[0]))
        if frame != first:
            raise ValueError(
                f"clip {number} of the list has frames of shape {frame[0]}, {frame[1]} on {frame[2]}, but clip 0 has {first[0]}, "
                f"{first[1]} on {first[2]}; packed clips differ in their number of frames alone"
            )
    return torch.cat(list(clips)).unsqueeze(0), PackedClips([clip.shape[0] for clip in clips])


def _as_video(images: Any, entry: Entry, channels: int | None) -> Tensor:
    """`(B, T, C, H, W)` of a video batch; an image batch `(B, C, H, W)` becomes clips of one frame.

    Raises:
        TypeError: no tensor.
        ValueError: another number of dimensions, no frame, or another number of channels.
    """
    channels, layout = _layout(entry, channels)
    if not isinstance(images, Tensor):
        raise TypeError(
            f"a patched model takes a tensor of video (B, T, {layout}) or images (B, {layout}), or a list of clips "
            f"(T, {layout}), not {type(images).__name__}"
        )
    video = images.unsqueeze(1) if images.ndim == entry.ndim else images
    right = channels is None or (video.ndim == 5 and video.shape[2] == channels)
    if video.ndim != entry.ndim + 1 or video.shape[1] < 1 or not right:
        swapped = video.ndim == 5 and video.shape[1] == channels
        hint = "; it looks like (B, C, T, H, W): use video.transpose(1, 2)" if swapped else ""
        raise ValueError(
            f"the input has shape {tuple(images.shape)}, expected video (B, T, {layout}) with at least one frame, or images "
            f"(B, {layout}){hint}"
        )
    return video


def _note_clips(noted: dict[int, Clips], images: int, clips: Clips, output: Any) -> None:
    """Note which clips images form: now, and again when a backward begins at the output of this forward."""

    def note(gradient: Tensor | None = None) -> None:
        noted[images] = clips

    def hook(output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.register_hook(note)
        elif isinstance(output, (Mapping, tuple, list)):
            for value in output.values() if isinstance(output, Mapping) else output:
                hook(value)

    note()
    hook(output)


_FRAME_FIELDS = ("hidden_states", "attentions")


def _by_clip(output: Any, clips: Clips, images: int, mean: bool, depth: int = 0) -> Any:
    """The output of an image method for B*T frames, `images` in number, as the output for B clips.

    Floating-point tensors are averaged over frames, or unfolded to `(B, T, ...)` (of packed clips, to a list); all others are
    unfolded. Tuples inside of an output (intermediate layers) and `hidden_states` of a dictionary keep their frames.
    """
    if isinstance(output, Tensor):
        if output.ndim == 0 or output.shape[0] != images:
            if mean and output.ndim:
                raise ValueError(
                    f"the image model returned a tensor of shape {tuple(output.shape)} for {images} images, "
                    "which has no row for each of them to be averaged over the frames of a clip"
                )
            return output
        return clips.mean(output) if mean and output.is_floating_point() else clips.by_clip(output)
    if isinstance(output, Mapping):
        values = {k: _by_clip(v, clips, images, mean and k not in _FRAME_FIELDS, depth + 1) for k, v in output.items()}
        return values if type(output) is dict else type(output)(**values)
    if isinstance(output, (tuple, list)):
        parts = [_by_clip(value, clips, images, mean and depth == 0, depth + 1) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if is_dataclass(output) and not isinstance(output, type):
        values = {f.name: _by_clip(getattr(output, f.name), clips, images, mean, depth + 1) for f in fields(output)}
        return replace(output, **values)
    return output


# ---- patching -------------------------------------------------------------------------------------------------------


def patch_encoder(encoder: nn.Module, family: Family, settings: Settings) -> None:
    """Patch an encoder in place. Nothing is changed if it raises.

    Raises:
        TypeError: blocks that are no transformer blocks, or that the placement cannot serve.
        ValueError: settings that do not fit the model.
    """
    blocks, sequence_first = family.find_blocks(encoder), family.is_sequence_first(encoder)
    if any(isinstance(module, Patched) for module in blocks):
        raise ValueError("the blocks of this model are patched already; call unpatch_vit(model) first")
    if len(set(blocks)) != len(blocks):
        raise TypeError(
            f"a block of this {type(encoder).__qualname__} is used more than once, which patch_vit cannot tell apart"
        )
    taken = [n for m, n in ((encoder, "temporal_encoder"), *((b, "temporal_link") for b in blocks)) if hasattr(m, n)]
    if taken:
        raise ValueError(f"this {type(encoder).__qualname__} has a {taken[0]} of its own, a name that patch_vit needs")
    missing = [entry.method for entry in family.entries if not hasattr(encoder, entry.method)]
    if missing:
        raise TypeError(
            f"{type(encoder).__qualname__} has no method {missing[0]!r}, which its family names as an entry"
        )
    _refuse_own(encoder, [entry.method for entry in family.entries])
    for block in blocks:
        _refuse_own(block, ["forward"])
    if settings.init == "copy" and settings.placement != "replace" and family.cannot_copy:
        reason = next(filter(None, (family.cannot_copy(encoder, block) for block in blocks)), None)
        if reason:
            raise ValueError(
                f"init='copy' cannot copy the blocks of this model: {reason}; use init='zero' or init='random'"
            )
    temporal = build_temporal_encoder(settings, blocks, sequence_first)
    for index in temporal.replaced:
        _check_replaced(encoder, blocks[index], family)
    inner = {module for block in blocks for module in block.modules()}
    convolution = next((m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m not in inner), None)
    temporal.channels = None if convolution is None else convolution.in_channels

    for index, block in enumerate(blocks):
        block.temporal_link = Link(encoder, temporal.place(index))  # type: ignore[assignment]
        swap_class(block, patched_class(VideoBlock, type(block)))
    for module in list(encoder.modules()):
        if type(module).__name__.startswith("PatchDropout"):
            module.temporal_link = Link(encoder)  # type: ignore[assignment]
            swap_class(module, patched_class(TubeDropout, type(module)))
    encoder.temporal_encoder = temporal.train(encoder.training)
    base: type[VideoEncoder] = family.base or VideoEncoder
    swap_class(encoder, patched_class(base, type(encoder), family))
    for index in temporal.replaced:
        for module in list(blocks[index].modules()):
            if isinstance(module, nn.MultiheadAttention):
                swap_class(module, patched_class(VideoMultiheadAttention, type(module)))
        encoder._prepare_replaced(blocks[index])  # type: ignore[operator]


def unpatch_encoder(encoder: Any) -> None:
    """Undo `patch_encoder` in place."""
    for module in list(encoder.modules()):
        if isinstance(module, VideoBlock) and module.temporal_link.place.replaced:
            encoder._restore_replaced(module)
    for module in list(encoder.modules()):
        if isinstance(module, Patched):
            vars(module).pop("temporal_link", None)
            if module is not encoder:
                swap_class(module, module.image_class)
    del encoder.temporal_encoder
    swap_class(encoder, encoder.image_class)


def _refuse_own(module: nn.Module, methods: list[str]) -> None:
    """Raises TypeError if the instance has replaced a method that patching must wrap."""
    for method in methods:
        if method in vars(module):
            raise TypeError(
                f"this {type(module).__qualname__} has its own {method} set on the instance, which patch_vit would lose; make "
                "it a method of a subclass"
            )


def _attention_dropout(module: nn.Module) -> float:
    """The probability with which a module drops attention weights, if it is one that has such."""
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout
    for name in ("attn_drop", "attention_dropout", "dropout_prob"):
        drop = getattr(module, name, None)
        if drop:
            return drop.p if isinstance(drop, nn.Dropout) else drop if isinstance(drop, float) else 0.0
    return 0.0


def _check_replaced(encoder: nn.Module, block: nn.Module, family: Family) -> None:
    """Raises if `placement="replace"` cannot serve a block."""
    kind = f"{type(block).__module__}.{type(block).__qualname__}"
    reason = family.cannot_replace(encoder, block) if family.cannot_replace else None
    for module in block.modules():
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
                reason = "its nn.MultiheadAttention has other options than query, key and value of one width"
            if type(module).forward is not nn.MultiheadAttention.forward:
                reason = f"{type(module).__qualname__} changes what nn.MultiheadAttention does"
        refuse_dropout(_attention_dropout(module))
        if getattr(module, "fused_attn", True) is False:
            reason = "its attention is not fused (fused_attn is False)"
    if reason:
        raise TypeError(f"placement='replace' cannot serve {kind}: {reason}; use placement='append' or 'interleave'")
