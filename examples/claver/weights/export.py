"""The two towers as programs of torch.export, which run without this example, and a JSON file that says how to feed them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.export import Dim

import kronmask
from kronmask.masks import mask_rule

from ..config import Config
from ..files import replace_file, write_text
from ..model import Claver
from ..prompts.build import tokenize
from ..text import encode_prompts

__all__ = ["Exported", "export", "load_export"]

VIDEO, TEXT, TEXTS, ABOUT = "video.pt2", "text.pt2", "texts.safetensors", "export.json"
TOLERANCE = 1e-5  # between an exported tower and the model, on features of length 1 at most


class Exported(NamedTuple):
    """What `export` wrote.

    Attributes:
        video: features `(B, E)` of clips `(B, T, 3, size, size)`.
        text: normalised features `(N, E)` of tokens `(N, context)`.
        text_features: of the classes, `(A, C, E)`.
        about: the content of export.json.
    """

    video: Any
    text: Any
    text_features: Tensor
    about: dict[str, Any]

    def probabilities(self, video: Tensor) -> Tensor:
        """Of the classes, `(B, C)`, for clips `(B, T, 3, size, size)`: softmax over classes, averaged over prompts."""
        cosines = torch.einsum("be,ace->bac", self.video(video), self.text_features)
        return (self.about["logit_scale"] * cosines).softmax(-1).mean(1)


class _VideoTower(nn.Module):
    def __init__(self, model: Claver) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> Tensor:
        return self.model.encode_video(video)


class _TextTower(nn.Module):
    def __init__(self, model: Claver) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens[None])[0]


@torch.no_grad()
def export(
    model: Claver,
    folder: str | Path,
    *,
    config: Config,
    classes: Sequence[str],
    prompts: Sequence[Sequence[str]],
    overwrite: bool = False,
) -> Path:
    """Write `video.pt2` and `text.pt2`, the features of the classes' texts, and `export.json`; reload and compare the programs.

    Any batch size will do, and any number of frames unless the mask depends on it (a window, `dilated`).

    Args:
        model: in evaluation mode; the programs are for its device.
        folder: is made if it is not there.
        config: of the training: frames and preprocessing.
        classes: names by label.
        prompts: `[A][C]`, the texts of the classes.
        overwrite: replace what was exported to `folder` before.

    Returns:
        `folder`.

    Raises:
        ValueError: a folder that holds an export, or a program that gives other numbers than the model.
        OSError: a folder that cannot be written to.
    """
    folder = Path(folder)
    if (folder / ABOUT).exists() and not overwrite:
        raise ValueError(f"{folder}: holds an export already; pass --overwrite, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    size, frames, context = config.augment.size, config.model.frames, model.clip.context_length
    batch, any_frames = Dim("batch", min=1), _takes_any_frames(model)
    clips = _clips(3, 5 if any_frames else frames, size, device)
    video_shape: dict[int, Any] = {0: batch} | ({1: Dim("frames", min=1)} if any_frames else {})
    lengths = (frames, frames + 1, 1) if any_frames else (frames,)
    tokens = tokenize(prompts, context_length=context).to(device)
    texts = tokens.flatten(0, 1)
    _write(
        _VideoTower(model),
        folder / VIDEO,
        {"video": (clips, video_shape)},
        [_clips(count, length, size, device) for count, length in zip((1, 2, 5), lengths, strict=False)],
    )
    _write(_TextTower(model), folder / TEXT, {"tokens": (texts[:1].repeat(3, 1), {0: batch})}, [texts[:1], texts[:7]])
    about = {
        "format": "claver-export-1",
        "import": "kronmask",  # before torch.export.load: it registers the operators
        "video": {
            "file": VIDEO,
            "input": ["batch", "frames" if any_frames else frames, 3, size, size],
            "frames": frames,  # of training
            "any_frames": any_frames,
            "sampling": "the middle frame of each of as many equal segments of a video",
            "short_side": config.augment.short_side,
            "size": size,  # of the centre crop
            "mean": config.augment.mean,  # of RGB in [0, 1]
            "std": config.augment.std,
        },
        "text": {"file": TEXT, "input": ["batch", context], "tokenizer": "CLIP's, padded with 0"},
        "texts": {"file": TEXTS, "prompts": prompts},
        "logit_scale": model.clip.logit_scale.exp().item(),
        "classes": list(classes),
        "device": str(device),
        "versions": {"torch": torch.__version__, "kronmask": kronmask.__version__},
    }
    features = encode_prompts(model, tokens).cpu().contiguous()
    with replace_file(folder / TEXTS) as partial:
        partial.write_bytes(save({"features": features}))
    write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")  # last: it vouches for the rest
    return folder


def load_export(folder: str | Path) -> Exported:
    """What `export` wrote into a folder, ready to be called.

    Raises:
        ValueError: a folder that holds no export.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise ValueError(f"{folder}: holds no export (there is no {ABOUT})")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    towers = [torch.export.load(folder / about[tower]["file"]).module() for tower in ("video", "text")]
    features = load_file(folder / about["texts"]["file"])["features"].to(about["device"])
    return Exported(towers[0], towers[1], features, about)


def _write(tower: nn.Module, path: Path, given: dict[str, tuple[Tensor, dict[int, Any]]], tried: list[Tensor]) -> None:
    """Export a tower of one argument, given as `{name: (example, dynamic dimensions)}`, and compare it on other inputs."""
    ((name, (example, dynamic)),) = given.items()
    program = torch.export.export(tower.eval(), (example,), dynamic_shapes={name: dynamic})
    with replace_file(path) as partial:
        with partial.open("wb") as file:  # its name has not the ending that torch wants
            torch.export.save(program, file)
        with partial.open("rb") as file:
            reloaded = torch.export.load(file).module()
        for value in (example, *tried):
            apart = (reloaded(value) - tower(value)).abs().max().item()
            if not apart <= TOLERANCE:
                raise ValueError(f"{path}: gives features that are {apart:.1e} from the model's; nothing was written")


def _takes_any_frames(model: Claver) -> bool:
    """Whether the rules of all masks hold at every size, so that one program serves clips of any length."""
    names = [mask.attention for mask in model.clip.visual.temporal_encoder.masks()]
    return all(isinstance(name, str) and mask_rule(name, 8, 5) == mask_rule(name, 11, 10) for name in names)


def _clips(count: int, frames: int, size: int, device: torch.device) -> Tensor:
    return torch.randn(count, frames, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
