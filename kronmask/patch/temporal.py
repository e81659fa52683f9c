"""The temporal half of a patched model: what it is, where its layers run, and how it is built like the image blocks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronmask.clips import Clips
from kronmask.nn import KronAttention, MaskRule, TemporalBlock, TemporalEmbedding, TemporalResidual
from kronmask.patch.settings import Settings

__all__ = ["TemporalEncoder", "build_temporal_encoder", "heads_module"]


@dataclass(frozen=True)
class Place:
    """What the temporal encoder does around one image block; said once, so that equal blocks compile to one graph."""

    index: int
    last: bool
    embedded: bool  # the temporal embedding is added in front of it
    residual: str | None  # key of the residual in front of it
    replaced: bool
    appended: bool  # the embedding and the temporal blocks come behind it


class TemporalEncoder(nn.Module):
    """The temporal layers of a patched model; the one child that patching adds to it.

    Its parameters are all that is new: `temporal_encoder.embedding.weight`, `temporal_encoder.blocks.{i}.*` (append) and
    `temporal_encoder.residuals.{index of the image block}.*` (interleave). The image blocks call `before` and `after`, each with
    its `place`.

    Args:
        depth: number of image blocks.
        embedding: added to the tokens before the first temporal attention.
        blocks: run after the last image block (append).
        residuals: run in front of the image block of that index (interleave).
        replaced: indices of the image blocks whose own attention runs over the whole clip (replace).
        mask: of the replaced attention.
        rotary: whether the replaced attention turns queries and keys by the time of their frame.
    """

    def __init__(
        self,
        depth: int,
        embedding: TemporalEmbedding | None,
        *,
        blocks: Iterable[TemporalBlock] = (),
        residuals: dict[int, TemporalResidual] | None = None,
        replaced: Iterable[int] = (),
        mask: MaskRule | None = None,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        residuals = residuals or {}
        self.depth = depth
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.residuals = nn.ModuleDict({str(index): residual for index, residual in residuals.items()})
        self.replaced = tuple(replaced)
        self.mask = mask
        self.rotary = rotary
        self.first = min((*residuals, *self.replaced), default=None)  # the embedding is added in front of this block
        self.checkpointing = False
        self.channels: int | None = None  # of the images, where the model says
        self.frame_group: Any = None  # the ranks that share the frames of a clip, of `kronmask.distributed`
        self.clips: dict[int, Clips] = {}  # frames in a batch -> their clips, of the latest forward of that size

    def masks(self) -> list[MaskRule]:
        """The masks of all temporal attentions, of each group of heads."""
        rules = [] if self.mask is None else [self.mask]
        rules += [module.mask for module in self.modules() if isinstance(module, KronAttention)]
        return [group for rule in rules for group in rule.groups]

    def place(self, index: int) -> Place:
        """What is done around the image block `index`."""
        residual = str(index) if str(index) in self.residuals else None
        last, embedded = index == self.depth - 1, index == self.first and self.embedding is not None
        return Place(index, last, embedded, residual, index in self.replaced, last and self.first is None)

    def layers_at(self, place: Place) -> list[nn.Module]:
        """The temporal layers that run around an image block, in order."""
        embedding = [self.embedding] if self.embedding is not None and (place.embedded or place.appended) else []
        residual = [self.residuals[place.residual]] if place.residual is not None else []
        return [*embedding, *residual, *(self.blocks if place.appended else ())]

    def before(self, place: Place, x: Tensor, clips: Clips) -> Tensor:
        """What happens to tokens `(B*T, N, D)` in front of an image block."""
        if place.embedded:
            x = self._embed(x, clips)
        if place.residual is not None:
            x = _over_clip(self.residuals[place.residual], x, clips)
        return x

    def after(self, place: Place, x: Tensor, clips: Clips) -> Tensor:
        """What happens to tokens `(B*T, N, D)` behind an image block."""
        if place.appended:
            x = self._embed(x, clips)
            for block in self.blocks:
                x = _over_clip(block, x, clips)
        return x

    def _embed(self, x: Tensor, clips: Clips) -> Tensor:
        if self.embedding is None:
            return x
        return self.embedding(x.unflatten(0, (-1, clips.frames)), clips).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x`: an encoder that runs all its children (`nn.Sequential`) passes through here; the blocks do the work."""
        return x

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"clips": {}}  # what a pending backward needs is no part of a copy or a file

    def extra_repr(self) -> str:
        return f"depth={self.depth}" + (
            f", replaced={self.replaced}, attention={self.mask}, rotary={self.rotary}" if self.replaced else ""
        )


def _over_clip(layer: nn.Module, x: Tensor, clips: Clips) -> Tensor:
    """A temporal layer on the tokens `(B*T, N, D)` of all frames of each clip."""
    tokens = x.shape[1]
    clip = x.unflatten(0, (-1, clips.frames)).flatten(1, 2)  # (B, T*N, D)
    return layer(clip, clips, tokens).unflatten(1, (clips.frames, tokens)).flatten(0, 1)


# ---- what image blocks are made of ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockSizes:
    """What a temporal layer takes over from an image block. Found by what modules are, not by what they are called."""

    dim: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    norm: nn.Module | None
    qk_norm: nn.Module | None
    activation: nn.Module
    like: Tensor  # device and dtype of projections

    @classmethod
    def of(cls, block: nn.Module) -> BlockSizes:
        """Raises TypeError for a block in which no attention heads or no linear layer is found."""
        attn, linear = heads_module(block), next(_linears(block), None)
        if attn is None or linear is None:
            raise TypeError(
                f"no multi-head attention was found in {type(block).__module__}.{type(block).__qualname__}: a module of "
                "the block must have the attribute num_heads, num_attention_heads or heads, and linear layers"
            )
        dim, heads = linear.in_features, _num_heads(attn)
        head_dim = next((getattr(attn, name) for name in ("head_dim", "attention_head_size") if hasattr(attn, name)), 0)
        weight, _ = _in_proj(attn)
        if heads * head_dim != (dim if weight is None else weight.shape[0] // 3):  # absent, or of half a head
            head_dim = dim // heads
        mlp = _two_layers(block)
        norms = _norms(block)
        return cls(
            dim=dim,
            num_heads=heads,
            head_dim=head_dim,
            hidden_dim=mlp[0].out_features if mlp else 4 * dim,
            norm=norms[0] if norms else None,
            qk_norm=_qk_norms(attn, head_dim)[0],
            activation=_activation(block) or nn.GELU(),
            like=linear.weight,
        )


def heads_module(block: nn.Module) -> Any:
    """The module of a block that splits tokens into heads; it may be the block itself."""
    itself, *inner = block.modules()
    return next((module for module in (*inner, itself) if _num_heads(module)), None)


def _num_heads(module: nn.Module) -> int:
    names = ("num_heads", "num_attention_heads", "heads")
    return next((n for name in names if isinstance(n := getattr(module, name, None), int)), 0)


def attention_part(block: nn.Module) -> nn.Module:
    """The child of a block that does attention, with its output projection; the block itself if nothing else does."""
    return next((child for child in block.children() if heads_module(child)), block)


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (m for m in module.modules() if isinstance(m, nn.Linear))


def _outside(block: nn.Module, kind: Callable[[nn.Module], bool]) -> list[Any]:
    """Modules of a kind in a block but not in its attention, in order."""
    part = attention_part(block)
    inside = set() if part is block else set(part.modules())
    return [module for module in block.modules() if module not in inside and kind(module)]


def _norms(block: nn.Module) -> list[nn.Module]:
    return _outside(
        block, lambda m: "norm" in type(m).__name__.lower() and isinstance(getattr(m, "weight", None), Tensor)
    )


def _two_layers(block: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """The two linear layers of a plain MLP, or None if the block has another."""
    linears = _outside(block, lambda m: isinstance(m, nn.Linear))
    if len(linears) != 2 or linears[0].out_features != linears[1].in_features:
        return None
    return linears[0], linears[1]


def _activation(block: nn.Module) -> nn.Module | None:
    def is_activation(module: nn.Module) -> bool:
        name = type(module).__name__.lower()
        leaf = not list(module.children()) and not list(module.parameters())
        return leaf and not any(word in name for word in ("drop", "identity", "norm", "rope", "rotary", "scale"))

    return next(iter(_outside(block, is_activation)), None)


def _qk_norms(attn: nn.Module, head_dim: int) -> tuple[nn.Module, nn.Module] | tuple[None, None]:
    """The norms of queries and keys of each head, if there are any."""
    for names in (("q_norm", "k_norm"), ("ln_q", "ln_k")):
        q_norm, k_norm = (getattr(attn, name, None) for name in names)
        weight = getattr(q_norm, "weight", None)
        if isinstance(weight, Tensor) and weight.numel() == head_dim and k_norm is not None:
            return q_norm, k_norm
    return None, None


def _in_proj(attn: Any) -> tuple[Tensor | None, Tensor | None]:
    """Weight `(3*H*head_dim, D)` and bias of the projections to queries, keys and values; None where none is found."""
    if isinstance(weight := getattr(attn, "in_proj_weight", None), Tensor):
        return weight, attn.in_proj_bias
    single = getattr(attn, "qkv", None)
    parts: list[Any] = [single] if isinstance(single, nn.Linear) else []
    for names in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")):
        found = [getattr(attn, name, None) for name in names]
        if not parts and all(isinstance(part, nn.Linear) for part in found):
            parts = found
    if not parts:
        return None, None
    weight = torch.cat([part.weight for part in parts])
    biases: list[Tensor] = [weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    if single is not None and isinstance(getattr(attn, "q_bias", None), Tensor):  # BEiT has none for keys
        biases = [attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias]
    return weight, torch.cat(biases)


def _scales(block: nn.Module) -> list[Tensor]:
    """LayerScale: parameters of one value for each channel that belong to no norm and no linear layer, in order."""
    dim = next(_linears(block)).in_features
    modules = _outside(block, lambda m: not isinstance(m, nn.Linear) and "norm" not in type(m).__name__.lower())
    own = [p for module in modules for p in module.parameters(recurse=False)]
    return [parameter for parameter in own if parameter.shape == (dim,)]


# ---- building -------------------------------------------------------------------------------------------------------


def build_temporal_encoder(
    settings: Settings, blocks: Sequence[nn.Module], sequence_first: bool = False
) -> TemporalEncoder:
    """The temporal half for an encoder of image `blocks`, on their device and in their dtype.

    Raises:
        TypeError: a block without attention.
        ValueError: `layers` does not fit the depth, or `init="copy"` of blocks that cannot be copied.
    """
    depth = len(blocks)
    embedding = None
    rotary = settings.temporal_embedding == "rotary"
    if settings.temporal_embedding is True:
        sizes = BlockSizes.of(blocks[0])
        embedding = TemporalEmbedding(sizes.dim, settings.frames, std=0.0 if settings.init == "zero" else 0.02)
        embedding.to(device=sizes.like.device, dtype=sizes.like.dtype)
    if settings.placement == "append":
        count = settings.appended(depth)
        sources = blocks[depth - count :] if settings.init == "copy" else [blocks[-1]] * count
        appended = [_temporal_layer(TemporalBlock, settings, block, count, sequence_first) for block in sources]
        return TemporalEncoder(depth, embedding, blocks=appended)
    indices = settings.selected(depth)
    if settings.placement == "replace":
        mask = MaskRule(settings.attention)
        for index in indices:
            heads = BlockSizes.of(blocks[index]).num_heads
            if heads % len(mask.groups):
                raise ValueError(
                    f"the {heads} heads of image block {index} do not divide into {len(mask.groups)} equal groups, one for each "
                    "mask"
                )
        return TemporalEncoder(depth, embedding, replaced=indices, mask=mask, rotary=rotary)
    count = len(indices)
    residuals = {i: _temporal_layer(TemporalResidual, settings, blocks[i], count, sequence_first) for i in indices}
    return TemporalEncoder(depth, embedding, residuals=residuals)


def _temporal_layer(kind: type[Any], settings: Settings, block: nn.Module, count: int, sequence_first: bool) -> Any:
    """A temporal layer of the sizes, norms and activation of an image block, initialised as `settings` say."""
    sizes = BlockSizes.of(block)
    options: dict[str, Any] = {"head_dim": sizes.head_dim, "rotary": settings.temporal_embedding == "rotary"}
    if sizes.norm is not None:
        options["norm_layer"] = lambda dim: _fresh(sizes.norm)
    if sizes.qk_norm is not None:
        options["qk_norm"] = lambda dim: _fresh(sizes.qk_norm)
    if kind is TemporalBlock:
        options |= {"hidden_dim": sizes.hidden_dim, "act_layer": lambda: copy.deepcopy(sizes.activation)}
    layer = kind(sizes.dim, sizes.num_heads, settings.attention, **options)
    layer.to(device=sizes.like.device)
    layer.reset_parameters(count)
    if settings.init == "copy":
        _copy(layer, block)
        _check_copy(layer, block, sequence_first)
    for module in layer.modules():  # the norms keep the dtype of the image model's norms
        if isinstance(module, nn.Linear):
            module.to(dtype=sizes.like.dtype)
        elif isinstance(module, KronAttention):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(sizes.like.dtype)
    if settings.init == "zero":
        layer.zero_output_()
    return layer.requires_grad_(True)


def _fresh(norm: Any) -> nn.Module:
    """A norm of the same type, eps and dtype, as at the start of training."""
    norm = copy.deepcopy(norm)
    _drop_hooks(norm)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return norm


def _drop_hooks(module: nn.Module) -> None:
    for child in module.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()


# ---- init="copy" ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _copy(layer: TemporalResidual, block: nn.Module) -> None:
    """Copy the weights of an image block into a temporal layer, its LayerScale multiplied into the output projections.

    What is found by looking is confirmed by `_check_copy`.
    """
    part, attn = attention_part(block), heads_module(block)
    assert attn is not None
    weight, bias = _in_proj(attn)
    inputs = {getattr(attn, name, None) for name in ("qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value")}
    outputs = [linear for linear in _linears(part) if linear not in inputs]
    norms, mlp, scales = _norms(block), _two_layers(block), _scales(block)
    if weight is None or part is block or len(outputs) != 1 or outputs[0].in_features != weight.shape[0] // 3:
        raise ValueError(
            _cannot_copy(block, f"they attend by {type(attn).__name__}, which is not query, key, value, output")
        )
    if len(norms) != 2 or len(scales) not in (0, 2):
        raise ValueError(_cannot_copy(block, "they are not norm, attention, norm, MLP"))
    if weight.shape != layer.attn.in_proj_weight.shape:
        raise ValueError(_cannot_copy(block, f"their projection is {tuple(weight.shape)}"))
    layer.ln_1.load_state_dict(norms[0].state_dict())
    layer.attn.in_proj_weight.copy_(weight)
    assert layer.attn.in_proj_bias is not None
    layer.attn.in_proj_bias.zero_() if bias is None else layer.attn.in_proj_bias.copy_(bias)
    for own, image in zip((layer.attn.q_norm, layer.attn.k_norm), _qk_norms(attn, layer.attn.head_dim), strict=True):
        if image is not None:
            own.load_state_dict(image.state_dict())
    _copy_linear(layer.attn.out_proj, outputs[0], scales[0] if scales else None)
    if isinstance(layer, TemporalBlock):
        if mlp is None:
            raise ValueError(_cannot_copy(block, "their MLP is not two linear layers"))
        layer.ln_2.load_state_dict(norms[1].state_dict())
        _copy_linear(layer.mlp.c_fc, mlp[0], None)
        _copy_linear(layer.mlp.c_proj, mlp[1], scales[1] if scales else None)


def _copy_linear(target: nn.Linear, source: nn.Linear, scale: Tensor | None) -> None:
    factor = torch.ones_like(target.bias) if scale is None else scale.to(target.bias)
    target.weight.copy_(factor[:, None] * source.weight)
    target.bias.zero_() if source.bias is None else target.bias.copy_(factor * source.bias)


@torch.no_grad()
def _check_copy(layer: TemporalResidual, block: nn.Module, sequence_first: bool) -> None:
    """Raises ValueError unless the copy computes what the image block does, on one frame of random tokens.

    A residual takes the attention alone, so the rest of the block is silenced for the comparison.
    """
    if layer.attn.out_proj.weight.is_meta:
        raise ValueError(
            "init='copy' has nothing to copy from: the model is on the meta device; load its weights first"
        )
    image: Any
    ours: Any
    image, ours = (copy.deepcopy(module).float().eval() for module in (block, layer))
    _drop_hooks(image)
    if not isinstance(layer, TemporalBlock):
        for linear in _outside(image, lambda m: isinstance(m, nn.Linear)):
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()
    tokens, generator = 5, torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, layer.attn.dim, generator=generator).to(layer.attn.out_proj.weight.device)
    parameters = list(inspect.signature(type(image).forward).parameters.values())[2:]
    required = [None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    try:
        expected = image(x.transpose(0, 1) if sequence_first else x, *required)
    except Exception as error:
        raise ValueError(_cannot_copy(block, f"they do not run by themselves ({error})")) from error
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = expected.transpose(0, 1) if sequence_first else expected
    ours.attn.mask = MaskRule("spatial")
    actual = ours(x, 1, tokens)
    if expected.shape != actual.shape or not torch.allclose(actual, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(_cannot_copy(block, "they compute more than norm, attention, norm, MLP"))


def _cannot_copy(block: nn.Module, reason: str) -> str:
    return (
        f"init='copy' cannot copy the blocks of this model, {type(block).__qualname__}: {reason}; "
        "use init='zero' or init='random'"
    )
