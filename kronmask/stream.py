"""`FrameStream`: a patched model on frames as they come, each computed once, under a mask that is causal over frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kronmask.attention import rule_attention
from kronmask.clips import Clips
from kronmask.mask import EMPTY, KronMask
from kronmask.nn import Attention, MaskRule, TemporalEmbedding
from kronmask.patch.video import VideoEncoder

__all__ = ["FrameStream"]

LONGEST_PROBE = 512
"""Frames of the masks in which a window is looked for: one of up to half as many is found."""


class FrameStream:
    """A patched model that is given the frames of a clip one or a few at a time.

    `stream(frames)` is what `forward_frames` returns for these frames in the whole clip, given all frames before them. The
    image blocks run on the new frames alone. Keys and values of the temporal layers stay in buffers: those of the frames
    that a later frame can see, so that under a window of W frames memory and time for a frame are the same however many
    have passed. Nothing is differentiated.

    Args:
        model: a model that `patch_vit` has patched with a mask that is causal over frames, in `eval` mode; the stream holds
            it, it does not copy it.
        length: frames of the clip that the stream is, where it has an end: then the learned temporal embedding is laid out
            over them, and the mask may see all earlier frames. Without it the mask must have a window (`functools.partial(
            masks.kmct, window=8)`), and time must be `temporal_embedding="rotary"` or False.
        repeat: whether a stream with a `length` goes on beyond it, with the learned embedding from its start again; the mask
            must then have a window.

    Raises:
        TypeError: the model is not patched, or has several patched encoders.
        ValueError: a mask in which a frame sees a later one, a mask or an embedding that has no end in a stream without.
    """

    def __init__(self, model: nn.Module, *, length: int | None = None, repeat: bool = False) -> None:
        encoders = [module for module in model.modules() if isinstance(module, VideoEncoder)]
        if len(encoders) != 1:
            raise TypeError(
                f"FrameStream takes a model that patch_vit has patched; this {type(model).__name__} has {len(encoders)} patched "
                "encoders"
            )
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"length must be a number of frames of at least 1, not {length!r}")
        self.encoder: Any = encoders[0]
        self.model = model
        if self.encoder.temporal_encoder.frame_group is not None:
            raise ValueError("a stream has its frames in one process; turn frame_parallel(model, None) first")
        masks = self.encoder.temporal_encoder.masks()
        fixed = [mask.attention for mask in masks if isinstance(mask.attention, KronMask)]
        if fixed and not repeat:
            length = fixed[0].num_frames if length is None else length
        learned = any(isinstance(module, TemporalEmbedding) for module in self.encoder.temporal_encoder.children())
        if learned and length is None:
            raise ValueError(
                "the learned temporal embedding is laid out over a clip's length, which a stream has to be told: "
                "FrameStream(model, length=frames); a model patched with temporal_embedding='rotary' needs none"
            )
        if repeat and length is None:
            raise ValueError("repeat=True goes on beyond a length; pass length=, or leave repeat out")
        self.length, self.repeat = length, repeat
        self._frames = _StreamedFrames(None if repeat else length, length)
        for mask in masks:
            if isinstance(mask.attention, (str, KronMask)):  # a function may need to know the tokens of a frame
                _Memory.of(
                    mask, self._frames.end, mask.attention.num_tokens if isinstance(mask.attention, KronMask) else 4
                )
        self._compiled: Callable[..., Any] | None = None

    @torch.no_grad()
    def __call__(self, frames: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The outputs `(B, t, ...)` of the next t frames of B streams.

        Args:
            frames: `(B, t, C, H, W)`, or `(B, C, H, W)` for one frame of each stream.
            args, kwargs: further arguments of the image model's forward.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: frames beyond the stream's `length`, or of other sizes than those before; the stream is as it was.
        """
        if self.encoder.training:
            raise RuntimeError(
                "a stream runs a model in eval mode: dropout would differ from frame to frame; call model.eval()"
            )
        entry = self.encoder.family.entries[0]
        if not isinstance(frames, Tensor) or frames.ndim not in (entry.ndim, entry.ndim + 1):
            shown = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise ValueError(
                f"frames must be (B, t, C, H, W), or (B, C, H, W) for one frame of each stream, not {shown}"
            )
        frames = frames.unsqueeze(1) if frames.ndim == entry.ndim else frames
        state = self._frames
        if not state.fits(frames) and not any(state.seen):
            self._lay_out(frames, args, kwargs)
        state.begin(frames)
        run = self._run
        if self._compiled is not None and state.is_steady:
            run = self._compiled
            state.make_static()
        output = run(frames, *args, **kwargs)
        state.end_step()
        return output

    def _run(self, frames: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._frames.next_layer = 0
        return self.encoder._encode(self.encoder.family.entries[0], "frames", frames, args, kwargs, self._frames)

    def _lay_out(self, frames: Tensor, args: Any, kwargs: Any) -> None:
        """Allocate the buffers, for which the keys and values of one frame are looked at once."""
        survey = _Survey()
        self.encoder._encode(self.encoder.family.entries[0], "frames", frames[:, :1], args, kwargs, survey)
        if not survey.layers:
            raise RuntimeError(
                f"{type(self.encoder).__name__} has run no temporal attention, so there is nothing to stream"
            )
        self._frames.clear()
        self._frames.lay_out(survey.layers, frames)

    def compile(self, **options: Any) -> None:
        """Run frames by `torch.compile`, with its options, once the window is full: from then on one graph serves.

        Before that, and under a mask without a window, each frame sees more frames than the one before and runs uncompiled.
        Another number of frames in a call is another graph. Within it nothing depends on the host and the buffers keep their
        addresses, so that `mode="reduce-overhead"` can capture it as a CUDA graph (which no GPU has been at hand to try).
        """
        self._compiled = torch.compile(self._run, **options)

    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Begin anew: some streams of the batch, by their numbers, or all, which may then be others in number and size."""
        state = self._frames
        chosen = range(len(state.seen)) if streams is None else streams
        wrong = [stream for stream in chosen if not 0 <= stream < len(state.seen)]
        if wrong:
            raise ValueError(f"there is no stream {wrong[0]}: this batch has {len(state.seen)}")
        for stream in chosen:
            state.seen[stream] = 0
        state.is_torn = state.is_torn and any(state.seen)

    @property
    def frames_seen(self) -> list[int]:
        """How many frames each stream has been given since it began; empty before the first."""
        return list(self._frames.seen)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the buffers: keys and values `(B, H, kept frames * N, D)` for each temporal attention."""
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self._frames.layers)

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand, to go on elsewhere with an equal model: frames seen, keys and values (not copied)."""
        return self._frames.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream was whose `state_dict` this is; on the device of this stream's model.

        Raises:
            ValueError: a state that does not fit this stream, which is then as it was.
        """
        masks = self.encoder.temporal_encoder.masks()
        self._frames.load_state_dict(state, masks, next(self.encoder.parameters()).device)

    def __repr__(self) -> str:
        return f"FrameStream({type(self.model).__name__}, length={self.length}, frames_seen={self.frames_seen})"


# ---- what a mask makes a stream remember ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Memory:
    """Which earlier frames a stream keeps: the first `sink` ones, and of the others the last `ring`.

    Attributes:
        mask: of a clip that is long enough for all that can happen.
        endless: beyond `sink + ring` frames the mask looks the same from every frame, apart from the distance to the sinks.
    """

    mask: KronMask
    sink: int
    ring: int
    endless: bool

    @staticmethod
    def of(rule: MaskRule, end: int | None, tokens: int) -> _Memory:
        return _memory(rule.attention, end, tokens)

    def kept(self, seen: int) -> list[int]:
        """Numbers of the frames that are kept after `seen` frames, in order."""
        return [*range(min(self.sink, seen)), *range(max(self.sink, seen - self.ring), seen)]

    def step(self, attention: MaskRule, seen: int, new: int) -> KronMask:
        """The mask of `new` frames against the kept ones and themselves, after `seen` frames."""
        seen = min(seen, self.sink + self.ring) if self.endless else seen
        total = seen + new
        mask = self.mask
        if total > mask.query_frames:  # more frames at once than the probe has; the window has been looked at
            rule = attention(total, mask.query_tokens)
            mask = KronMask.from_rule(rule, frames=(total, total), tokens=(mask.query_tokens, mask.key_tokens))
        return mask.select(query=range(seen, total), key=[*self.kept(seen), *range(seen, total)])


@lru_cache(maxsize=64)
def _memory(attention: Attention, end: int | None, tokens: int) -> _Memory:
    rule = MaskRule(attention)

    def mask(frames: int) -> KronMask:
        mask = KronMask.from_rule(rule(frames, tokens), frames=(frames, frames), tokens=(tokens, tokens))
        _refuse_future(mask, attention)
        return mask

    if isinstance(attention, KronMask):
        return _bounded(mask(attention.num_frames if end is None else end))
    frames, shorter = 16, mask(8)
    while frames <= min(LONGEST_PROBE, end or LONGEST_PROBE):
        longer = mask(frames)
        sink, ring = _window(longer)
        if (
            sink + ring <= frames // 2
            and _is_periodic(longer, sink, ring)
            and longer.select(query=slice(0, frames // 2), key=slice(0, frames // 2)) == shorter
        ):
            return _Memory(longer, sink, ring, endless=True)
        frames, shorter = 2 * frames, longer
    if end is None:
        raise ValueError(
            f"under attention {rule!r} frames see more than {LONGEST_PROBE // 2} frames, or each another number, so a stream "
            "without an end would keep ever more; give the mask a window, as functools.partial(masks.kmct, window=8), or the "
            "stream a length="
        )
    return _bounded(mask(end))


def _bounded(mask: KronMask) -> _Memory:
    return _Memory(mask, *_window(mask), endless=False)


def _refuse_future(mask: KronMask, attention: Attention) -> None:
    if mask.looks_ahead is not None:
        query, later = mask.looks_ahead
        raise ValueError(
            f"a stream's mask must be causal over frames, but under {attention!s} frame {query} sees frame {later}, which "
            "comes later; 'causal' and 'kmct' look back only"
        )


def _window(mask: KronMask) -> tuple[int, int]:
    """The sinks and the ring that hold every earlier frame that a frame sees, as few as possible."""
    first = [[key for key, code in enumerate(row[:query]) if code != EMPTY] for query, row in enumerate(mask.codes)]

    def ring(sink: int) -> int:
        reaches = (query - next((k for k in keys if k >= sink), query) for query, keys in enumerate(first))
        return max(reaches, default=0)

    return min(((sink, ring(sink)) for sink in range(mask.query_frames)), key=lambda pair: (sum(pair), pair[0]))


def _is_periodic(mask: KronMask, sink: int, ring: int) -> bool:
    """Whether the rows of all frames beyond sinks and ring are one row, moved."""
    codes, start = mask.codes, sink + ring

    def seen(query: int) -> tuple[int, ...]:
        return codes[query][:sink] + codes[query][query - ring : query + 1]

    return all(seen(query) == seen(start) for query in range(start, mask.query_frames))


# ---- the frames of a stream -----------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """One temporal attention of one group of heads: its mask, keys and values `(B, H, sink + ring, N, D)`, its next step."""

    mask: MaskRule
    memory: _Memory
    key: Tensor
    value: Tensor
    step: Any = None  # a _Step


class _Survey(Clips):
    """One frame, whose temporal attentions are noted and not run."""

    takes_groups = False

    def __init__(self) -> None:
        super().__init__(1)
        self.layers: list[tuple[MaskRule, int, Tensor, Tensor]] = []

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskRule,
        tokens: int,
        *,
        prefix: int = 0,
        scale: Any = None,
    ) -> Tensor:
        self.layers.append((mask, tokens, key, value))
        return torch.zeros_like(query)

    def embedding(self, embedding: TemporalEmbedding) -> Tensor:
        return embedding.weight[:, :1]


@dataclass
class _Group:
    """Streams that have seen equally much, as far as a mask can tell.

    Attributes:
        rows: their numbers in the batch; None for all of it.
        rule: the mask of the new frames against the kept ones and themselves.
        order: slots of the kept frames, from the first to the last, `(kept,)` int64.
    """

    rows: Tensor | None
    rule: str
    order: Tensor


@dataclass
class _Step:
    """What layers of one memory do with the next frames.

    Attributes:
        groups: the streams, as they attend.
        sinks: (stream, new frame, slot) of each new frame that is kept for good.
        new: the new frames that are kept in the ring, `(kept,)` int64.
        slots: and where, `(kept,)` int64.
    """

    groups: list[_Group]
    sinks: list[tuple[int, int, int]]
    new: Tensor
    slots: Tensor


class _StreamedFrames(Clips):
    """The new frames of streams: they attend to those that are kept, and are kept themselves.

    All streams of a batch are given frames together, so that one place in the ring, `written % ring`, serves all; a stream that
    began later has fewer of the ring's frames.

    Args:
        end: number of frames after which the streams end, if they do.
        length: number of frames that the learned embedding is laid out over.
    """

    takes_groups = False

    def __init__(self, end: int | None, length: int | None) -> None:
        super().__init__(1)
        self.end, self.length = end, length
        self.clear()

    def clear(self) -> None:
        self.layers: list[_Layer] = []
        self.image: str | None = None  # what all frames have in common
        self.seen: list[int] = []
        self.written = 0
        self.is_steady = False
        self.is_torn = False  # some layers have kept the frames of a step that has failed, and some have not
        self.next_layer = 0
        self._times = self._embedded = torch.empty(0)
        self._fixed: dict[Any, Tensor] = {}  # at one address for as long as their size is the same
        self._rules: dict[tuple[_Memory, int, int], str] = {}

    def lay_out(self, layers: list[tuple[MaskRule, int, Tensor, Tensor]], frames: Tensor) -> None:
        """Allocate what temporal attentions keep, given the keys and values of one of `frames (B, t, ...)`."""
        for mask, tokens, key, value in layers:
            memory = _Memory.of(mask, self.end, tokens)
            slots = memory.sink + memory.ring
            buffers = (x.new_zeros(*x.shape[:2], slots, tokens, x.shape[3]) for x in (key, value))
            self.layers.append(_Layer(mask, memory, *buffers))
        self.image, self.seen = _kind(frames), [0] * frames.shape[0]

    def fits(self, frames: Tensor) -> bool:
        """Whether the buffers are for such frames."""
        return _kind(frames) == self.image and frames.shape[0] == len(self.seen)

    def begin(self, frames: Tensor) -> None:
        """Make ready for the next `frames (B, t, ...)`; raises before anything has changed."""
        new, device = frames.shape[1], frames.device
        if self.is_torn:
            raise RuntimeError(
                "the call before has failed halfway; reset() the stream, or load_state_dict() what it was"
            )
        if not self.fits(frames) or new < 1:
            raise ValueError(
                f"this is a batch of {len(self.seen)} streams, with frames of {self.image}; got {new} frames of "
                f"{frames.shape[0]} streams, of {_kind(frames)}; reset() it to begin with others"
            )
        if self.end is not None and max(self.seen) + new > self.end:
            raise ValueError(
                f"the stream ends after {self.end} frames and has seen {max(self.seen)}, so it cannot take {new} more; reset() "
                "it, or give it another length= (or repeat=True)"
            )
        steps: dict[_Memory, _Step] = {}
        for layer in self.layers:
            if layer.memory not in steps:
                steps[layer.memory] = self._step(layer, new, device)
            layer.step = steps[layer.memory]
        self.is_steady = all(memory.endless and min(self.seen) >= memory.sink + memory.ring for memory in steps)
        length = None if self.end is not None else self.length
        times = [[*range(seen, seen + new)] for seen in self.seen]
        self._times = self._at("times", times, device)
        embedded = [[t if length is None else t % length for t in row] for row in times]
        self._embedded = self._at("embedded", embedded, device)
        self.frames = new

    def _step(self, layer: _Layer, new: int, device: torch.device) -> _Step:
        memory = layer.memory
        full = memory.sink + memory.ring
        kinds = [min(seen, full) if memory.endless else seen for seen in self.seen]
        groups = []
        for kind in dict.fromkeys(kinds):
            rows = [row for row, other in enumerate(kinds) if other == kind]
            if (memory, kind, new) not in self._rules:
                self._rules[memory, kind, new] = memory.step(layer.mask, kind, new).rule
            sinks = min(kind, memory.sink)
            ring = [
                memory.sink + (self.written - i) % memory.ring for i in range(len(memory.kept(kind)) - sinks, 0, -1)
            ]
            every = len(rows) == len(kinds)
            order = self._at((memory, "order", None if every else kind), [*range(sinks), *ring], device)
            groups.append(
                _Group(None if every else torch.tensor(rows, device=device), self._rules[memory, kind, new], order)
            )
        last = range(max(0, new - memory.ring), new)
        return _Step(
            groups,
            [(row, i, seen + i) for row, seen in enumerate(self.seen) for i in range(min(new, memory.sink - seen))],
            self._at((memory, "new"), [*last], device),
            self._at((memory, "slots"), [memory.sink + (self.written + i) % memory.ring for i in last], device),
        )

    def make_static(self) -> None:
        """Tell the compiler that buffers keep their addresses, without which a CUDA graph would not write into them."""
        for tensor in (*(x for layer in self.layers for x in (layer.key, layer.value)), *self._fixed.values()):
            torch._dynamo.mark_static_address(tensor)

    def end_step(self) -> None:
        self.seen = [seen + self.frames for seen in self.seen]
        self.written += self.frames
        self.is_torn = False

    def _at(self, name: Any, numbers: list[Any], device: torch.device) -> Tensor:
        """Numbers on a device, in the tensor that held the last ones of that name if it fits."""
        values = torch.tensor(numbers, dtype=torch.int64)
        held = self._fixed.get(name)
        if held is None or held.shape != values.shape or held.device != device:
            self._fixed[name] = values.to(device)
        else:
            held.copy_(values)
        return self._fixed[name]

    # ---- what temporal layers ask -----------------------------------------------------------------------------------

    def times(self, device: torch.device) -> Tensor:
        return self._times  # (B, t)

    def embedding(self, embedding: TemporalEmbedding) -> Tensor:
        assert self.length is not None
        times = self._embedded
        return embedding.at(self.length)[0].index_select(0, times.flatten()).unflatten(0, times.shape)  # (B, t, 1, D)

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
        layer = self.layers[self.next_layer]
        self.next_layer += 1
        step: _Step = layer.step
        new_key, new_value = (x.unflatten(2, (self.frames, tokens)) for x in (key, value))
        for kept, new in ((layer.key, new_key), (layer.value, new_value)):
            if kept.shape[:2] != new.shape[:2] or kept.shape[3:] != new.shape[3:]:
                raise ValueError(
                    f"a temporal attention has keys and values of {tuple(new.shape)}, but the stream keeps {tuple(kept.shape)}: "
                    "(B, heads, frames, tokens, head_dim); has it the state of another model?"
                )

        def attend(group: _Group) -> Tensor:
            def all_of(kept: Tensor, new: Tensor) -> Tensor:
                if group.rows is not None:
                    kept, new = kept[group.rows], new[group.rows]
                return torch.cat([kept.index_select(2, group.order), new], 2).flatten(2, 3)

            return rule_attention(
                query if group.rows is None else query[group.rows],
                all_of(layer.key, new_key),
                all_of(layer.value, new_value),
                group.rule,
                frames=(self.frames, group.order.shape[0] + self.frames),
                tokens=tokens,
                scale=scale,
            )

        if step.groups[0].rows is None:
            output = attend(step.groups[0])
        else:
            output = torch.empty_like(query)
            for group in step.groups:
                output[group.rows] = attend(group)
        self.is_torn = True
        for kept, new in ((layer.key, new_key), (layer.value, new_value)):
            for row, frame, slot in step.sinks:
                kept[row, :, slot] = new[row, :, frame]
            kept.index_copy_(2, step.slots, new.index_select(2, step.new))
        return output

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        kept = {f"{name}.{i}": getattr(layer, name) for i, layer in enumerate(self.layers) for name in ("key", "value")}
        return {"seen": torch.tensor(self.seen), "written": torch.tensor(self.written), "image": self.image} | kept

    def load_state_dict(self, state: dict[str, Any], masks: list[MaskRule], device: torch.device) -> None:
        count = (len(state) - 3) // 2
        names = {"seen", "written", "image"} | {f"{name}.{i}" for i in range(count) for name in ("key", "value")}
        if set(state) != names or not count:
            raise ValueError(f"not the state of a stream: it has {sorted(map(str, state))}")
        layers = []
        for i in range(count):
            key, value = (state[f"{name}.{i}"].to(device, copy=True) for name in ("key", "value"))
            mask = masks[i % len(masks)]
            memory = _Memory.of(mask, self.end, key.shape[3])
            if key.shape[2] != memory.sink + memory.ring or len(key) != len(state["seen"]):
                raise ValueError(
                    f"the state is of {len(key)} streams that keep {key.shape[2]} frames, but this stream's mask keeps "
                    f"{memory.sink + memory.ring}; the models have different masks, or the streams different lengths"
                )
            layers.append(_Layer(mask, memory, key, value))
        self.clear()
        self.layers, self.image = layers, state["image"]
        self.seen, self.written = state["seen"].tolist(), int(state["written"])


def _kind(frames: Tensor) -> str:
    """What must be equal from call to call, in words."""
    return f"shape {tuple(frames.shape[2:])} and {frames.dtype}"
