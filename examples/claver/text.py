"""The texts of a training step, made cheap without changing what the step computes.

K prompts of C classes are K*C texts, which cost more than the clips of a step (79 % of it for ViT-B/16 with 8 clips a
GPU and 2,000 texts of 77 tokens). So each text is cut behind its end, where causal attention makes that exact; every
process encodes its share, and the features are gathered with their gradients; and a text tower that is not trained
encodes all prompts once.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from .prompts.build import draw_prompts, tokenize

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .model import Claver

__all__ = [
    "FrozenTexts",
    "StepTexts",
    "TrainingTexts",
    "encode_prompts",
    "group_sizes",
    "share_texts",
    "step_flops",
    "text_lengths",
    "tokens_of",
]

# A further pass through the text tower costs a GPU about as much as this many tokens: 2 ms of launches.
_PASS = 2048


@dataclass(frozen=True, eq=False)
class StepTexts:
    """What one process encodes of the texts of a step, and where the step finds their features.

    Attributes:
        groups: tokens `(n, length)` of this process's texts, each group cut to its longest.
        places: `(K, C)`, the row of each text among the gathered features of all processes.
        cut: whether `groups` are cut; the whole context otherwise.
        shared: whether the processes share the texts.
    """

    groups: tuple[Tensor, ...]
    places: Tensor
    cut: bool
    shared: bool

    def encode(self, clip: Any) -> Tensor:
        """Normalised features `(K, C, E)`, float32; every process must call it, and go backward through it."""
        features = self.encode_share(clip)
        if self.shared:
            features = _Gather.apply(features)
        return features[self.places.to(features.device)]

    def encode_share(self, clip: Any) -> Tensor:
        """Normalised features of this process's texts `(S, E)`, float32."""
        parts = [_encode_cut(clip, tokens) if self.cut else clip.encode_text(tokens) for tokens in self.groups]
        return F.normalize(torch.cat(parts).float(), dim=-1)


@dataclass(frozen=True, eq=False)
class FrozenTexts:
    """Features `(K, C, E)` of the texts of a step, which nothing trains."""

    features: Tensor

    def encode(self, clip: Any) -> Tensor:
        return self.features


class TrainingTexts:
    """The prompts of a run `(A, C, context)`, and those of each of its steps.

    Args:
        model: whose text tower encodes them, with its weights, and not wrapped: a tower that is not trained does it here.
        tokens: on the device of the training.
        accelerator: the processes, which share the texts.
        per_step: K, prompts of each class in a step.
        draws: "step": K different prompts, for all micro-batches and processes of a step; "microbatch": each of these has its
            own K, drawn with replacement, as in the authors' code.
        classes_per_step: classes of a step, those of its clips and others drawn at random; None: all.
        one_group: encode the texts of a process in one pass: a tower whose weights are shared over the processes must be
            called equally often by all of them.
    """

    def __init__(
        self,
        model: Claver,
        tokens: Tensor,
        accelerator: Accelerator,
        *,
        per_step: int,
        draws: str = "step",
        classes_per_step: int | None = None,
        one_group: bool = False,
    ) -> None:
        self.model, self.tokens, self.accelerator = model, tokens, accelerator
        self.per_step, self.draws, self.classes_per_step = per_step, draws, classes_per_step
        self.one_group = one_group
        self.lengths = text_lengths(model.clip, tokens.cpu()).flatten()  # (A*C,)
        self.cut = _can_cut(model.clip)
        self.frozen = not any(parameter.requires_grad for parameter in _text_parameters(model.clip))
        self._features: Tensor | None = None
        if self.frozen:
            model.to(tokens.device)
            with accelerator.autocast():  # as a step would
                self._features = encode_prompts(model, tokens)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Prompts `(processes, K)` of a step, or of a micro-batch; `generator` must be in the same state on all processes."""
        processes, prompts = self.accelerator.num_processes, len(self.tokens)
        if self.draws == "microbatch":
            return torch.randint(prompts, (processes, self.per_step), generator=generator)
        return draw_prompts(prompts, self.per_step, generator).expand(processes, -1)

    def draw_classes(self, label: Tensor, generator: torch.Generator) -> Tensor:
        """Classes of a micro-batch, increasing, on the device of its labels `(B,)`: the same on all processes.

        `torch.searchsorted(classes, label)` is where a label stands among them. If the clips of all processes have more than
        `classes_per_step` classes, these are taken and no others.
        """
        number = self.tokens.shape[1]
        if self.classes_per_step is None or self.classes_per_step >= number:
            return torch.arange(number, device=label.device)
        present = self.accelerator.gather(label).unique()
        rank = torch.rand(number, generator=generator).to(label.device)
        rank[present] = -1
        return rank.argsort()[: max(self.classes_per_step, len(present))].sort().values

    def describe(self, video: tuple[int, ...]) -> str:
        """The share of the text tower in the FLOPs of a step with clips `(B, T, C, H, W)` on each process, in words.

        Of one draw; other draws have other lengths. To be called before the model is wrapped.
        """
        prompts, classes = self.draw(torch.Generator().manual_seed(0)), torch.arange(self.tokens.shape[1])
        number = self.classes_per_step or len(classes)
        classes = classes[: max(1, min(number, len(classes)))]
        count = f"{self.per_step * len(classes):,} texts a step"
        if self.frozen:
            return f"{count}, all encoded once, as their tower is not trained"
        texts = self.of(prompts, classes)
        assert isinstance(texts, StepTexts)
        whole = self.tokens.new_empty(self.per_step * len(classes), self.tokens.shape[2], device="meta")
        of_texts, of_clips = step_flops(self.model, texts, video)
        uncut, _ = step_flops(self.model, replace(texts, groups=(whole,), cut=False), video)
        lengths = self.lengths.view(self.tokens.shape[:2])[prompts[0]][:, classes]
        return (
            f"{count} of {lengths.min()} to {lengths.max()} tokens, {sum(map(len, texts.groups)):,} on each process; their tower "
            f"does {of_texts / (of_texts + of_clips):.0%} of the {(of_texts + of_clips) / 1e12:.3g} TFLOP of a step "
            f"({uncut / (uncut + of_clips):.0%} if each process encoded all of them whole)"
        )

    def of(self, prompts: Tensor, classes: Tensor) -> StepTexts | FrozenTexts:
        """The texts of a step, for `Claver.forward`: of `draw` and `draw_classes`."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        if self._features is not None:
            return FrozenTexts(self._features[prompts[rank].to(self.tokens.device)][:, classes])
        drawn, own = prompts.unique(return_inverse=True)  # of all processes: what several have drawn is encoded once
        texts = (drawn[:, None] * self.tokens.shape[1] + classes.cpu()).flatten()
        share, places = share_texts(self.lengths[texts], ranks, rank)
        return StepTexts(
            _groups(self.tokens.flatten(0, 1), texts[share], self.lengths, one=self.one_group),
            places.view(len(drawn), len(classes))[own[rank]],
            self.cut,
            shared=ranks > 1,
        )


@torch.no_grad()
def encode_prompts(model: Claver, tokens: Tensor, batch_size: int = 512) -> Tensor:
    """Text features `(A, C, E)` of prompts `(A, C, context)`, in evaluation mode: once, not for each video."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    flat, lengths = tokens.flatten(0, 1), text_lengths(model.clip, tokens.cpu()).flatten()
    order, cut = lengths.argsort(stable=True), _can_cut(model.clip)
    features = []
    for texts in order.split(batch_size):
        group = flat[texts.to(flat.device), : int(lengths[texts[-1]])].to(device)
        places = torch.arange(len(texts))
        features.append(model.encode_text(StepTexts((group,), places, cut, shared=False)))
    model.train(training)
    return torch.cat(features)[order.argsort().to(device)].unflatten(0, tokens.shape[:2])


def share_texts(lengths: Tensor, ranks: int, rank: int) -> tuple[Tensor, Tensor]:
    """Deal texts of `lengths (n,)` to processes, in turn by length, so that all have as much to do.

    Returns:
        The texts of process `rank`, `(ceil(n / ranks),)`, increasing in length; if there are too few for all, the longest text
        once more. And the row of each text, `(n,)`, where those of all processes are put behind each other.
    """
    number = len(lengths)
    each = -(-number // ranks)
    order = lengths.argsort(stable=True)
    share = order[(rank + ranks * torch.arange(each)).clamp(max=number - 1)]
    dealt = torch.arange(number)
    places = torch.empty_like(dealt)
    places[order] = dealt % ranks * each + dealt // ranks
    return share, places


def group_sizes(lengths: Sequence[int], cost: int = _PASS) -> list[int]:
    """Sizes of the groups in which to encode texts of these increasing lengths, each group at its longest.

    The sum of all tokens, padding included, and of `cost` tokens for each group is the least possible.
    """
    counts = sorted(Counter(lengths).items())
    before = [0]  # texts before each of the different lengths
    for _, count in counts:
        before.append(before[-1] + count)
    least, cut = [0], [0]  # tokens of the best groups of the first lengths, and where their last group starts
    for end, (length, _) in enumerate(counts, 1):
        tokens, start = min((least[i] + (before[end] - before[i]) * length + cost, i) for i in range(end))
        least.append(tokens)
        cut.append(start)
    sizes: list[int] = []
    end = len(counts)
    while end:
        sizes.insert(0, before[end] - before[cut[end]])
        end = cut[end]
    return sizes


def text_lengths(clip: Any, tokens: Tensor) -> Tensor:
    """Tokens of each text up to its end, where the text tower reads its feature; the whole context if it may not be cut."""
    if not _can_cut(clip):
        return torch.full(tokens.shape[:-1], tokens.shape[-1])
    return _ends(_tower(clip), tokens) + 1


def step_flops(model: Claver, texts: StepTexts, video: tuple[int, ...]) -> tuple[int, int]:
    """FLOPs of a training step, forward and backward, on one process: of its texts, and of a clip batch `(B, T, C, H, W)`.

    Counted on a copy without values; `model` is not wrapped.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    empty = copy.deepcopy(model, memo)
    groups = tuple(tokens.to("meta") for tokens in texts.groups)
    counts = []
    for encode in (
        lambda: StepTexts(groups, texts.places, texts.cut, shared=False).encode_share(empty.clip),
        lambda: empty.encode_video(torch.empty(video, device="meta")),
    ):
        with FlopCounterMode(display=False) as counter:
            features = encode()
            if features.requires_grad:
                torch.autograd.backward(features.sum())
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


# ---- the text tower -------------------------------------------------------------------------------------------------


def _tower(clip: Any) -> Any:
    """Where the text tower's parts are: a CLIP has them itself."""
    return clip.text if hasattr(clip, "text") else clip


def _pooling(tower: Any) -> str:
    return getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))


def _can_cut(clip: Any) -> bool:
    """Whether no text sees what is behind its end: causal attention and the feature of the end token."""
    tower = _tower(clip)
    mask = getattr(tower, "attn_mask", None)
    if mask is None or getattr(tower, "cls_emb", None) is not None or _pooling(tower) not in ("argmax", "eos"):
        return False
    return mask.ndim == 2 and torch.equal(mask == -torch.inf, torch.ones_like(mask, dtype=torch.bool).triu(1))


def _ends(tower: Any, tokens: Tensor) -> Tensor:
    """The place of the end token."""
    if _pooling(tower) == "argmax":  # the highest of the vocabulary
        return tokens.argmax(-1)
    end: Any = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    return torch.eq(tokens, end).int().argmax(-1)


def _encode_cut(clip: Any, tokens: Tensor) -> Tensor:
    """`clip.encode_text` of tokens `(n, length)`, where length may be less than the context."""
    tower, length = _tower(clip), tokens.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x[torch.arange(len(x), device=x.device), _ends(tower, tokens)])
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def _text_parameters(clip: Any) -> list[nn.Parameter]:
    other = ("visual.", "logit_")
    return [parameter for name, parameter in clip.named_parameters() if not name.startswith(other)]


def _groups(tokens: Tensor, texts: Tensor, lengths: Tensor, *, one: bool) -> tuple[Tensor, ...]:
    """Tokens of texts that increase in length, in groups cut to their longest, or in one."""
    groups = (texts,) if one else texts.split(group_sizes(lengths[texts].tolist()))
    return tuple(tokens[group.to(tokens.device), : int(lengths[group[-1]])] for group in groups)


class _Gather(torch.autograd.Function):
    """The features of all processes behind each other; the gradient is the sum of all processes' gradients.

    Each process then holds the gradient of the sum of all losses for its texts, and the mean over processes that data
    parallelism takes of the parameters' gradients is the gradient of the mean loss, as without sharing.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:  # type: ignore[override]
        gathered = features.new_empty(dist.get_world_size() * len(features), features.shape[1])
        dist.all_gather_into_tensor(gathered, features.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def tokens_of(prompts: list[list[str]], model: Claver) -> Tensor:
    """Tokens `(A, C, context)` for the text tower of `model`."""
    return tokenize(prompts, context_length=model.clip.context_length)
