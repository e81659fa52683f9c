"""Every plain ViT of timm and one model of each family, against all that the suite of this folder states.

    python tests/patch/zoo.py            # prints and stores benchmarks/results/zoo.json; `make zoo`

Models of timm that differ in size alone are one model here, since all are made small: the first of each kind is checked.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import test_patch_contract as contract
import test_reference
import timm
import torch
from models import CASES, TIMM_LIKE, Case, clips, encode, encoder, image_model, stir
from torch import nn
from tqdm import tqdm

from kronmask import patch_vit, temporal_parameters
from kronmask.patch import timm as family_file

PLACEMENTS = ("append", "interleave", "replace")
FAMILIES = {
    "timm VisionTransformer, DeiT, hybrid, ViTamin": "timm",
    "timm Eva: EVA-02, DINOv3, PE, ViT-RoPE": "timm-eva02",
    "timm Beit": "timm-beit",
    "timm VisionTransformerRelPos": "timm-relpos",
    "timm VisionTransformerSAM": "timm-sam",
    "timm NaFlexVit": "timm-naflex",
    "timm Cait": "timm-cait",
    "open_clip CLIP, CustomTextCLIP, CoCa": "open_clip-CLIP",
    "open_clip with a timm tower": "open_clip-timm-tower",
    "OpenAI clip": "clip",
    "transformers ViT, DeiT": "transformers-ViT",
    "transformers CLIP": "transformers-CLIP",
    "transformers SigLIP": "transformers-SigLIP",
    "transformers DINOv2": "transformers-DINOv2",
    "transformers BEiT with position bias": "transformers-BEiT",
    "torchvision VisionTransformer": "torchvision",
    "a ViT of one's own": "own",
}
"""One model of `CASES` for each row of the table."""


# ---- what is checked ------------------------------------------------------------------------------------------------


def attention_for(placement: str) -> str:
    return "causal" if placement == "replace" else "kmct"


def patched(name: str, placement: str, **options: Any) -> nn.Module:
    model = patch_vit(
        image_model(name), placement=placement, attention=attention_for(placement), family=CASES[name].family, **options
    )
    return stir(model)


def equals_at_init(name: str, placement: str) -> None:
    if placement == "replace":
        contract.test_replace_under_the_spatial_mask_is_the_image_model_averaged_over_frames(name)
    else:
        contract.test_zero_init_is_the_image_model_averaged_over_frames(name, placement)


def takes_any_number_of_frames(name: str, placement: str) -> None:
    model = patched(name, placement, frames=3)
    for frames in (1, 2, 5):
        expected = {output.shape[0] for output in encode(name, model, clips(name, frames))}
        assert expected == {2}
        assert encoder(name, model).forward_tokens(clips(name, frames)).shape[:2] == (2, frames)


def has_the_gradients_of_the_plain_model(name: str, placement: str) -> None:
    test_reference.test_outputs_and_gradients_are_those_of_the_plain_implementation(name, placement, "kmct", True)
    model = patched(name, placement).train()
    sum(output.square().sum() for output in encode(name, model, clips(name))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in temporal_parameters(model).values())


def compiles(name: str, placement: str) -> None:
    torch._dynamo.reset()
    model = patched(name, placement, frames=4)
    compiled = torch.compile(partial(encode, name, model), fullgraph=True, backend="eager")
    for frames in (4, 3):
        contract.assert_same(
            compiled(clips(name, frames)), encode(name, model, clips(name, frames)), rtol=1e-4, atol=1e-5
        )


class Exported(nn.Module):
    """The encoder's output as tensors, which is what an exported program returns."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder(name, model)

    def forward(self, video: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return contract.outputs(self.encoder(video))


def exports(name: str, placement: str) -> None:
    model = Exported(name, patched(name, placement, frames=4)).eval()
    batch, frames = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("frames", min=2, max=64)
    program = torch.export.export(model, (clips(name, 4, 2),), dynamic_shapes=({0: batch, 1: frames},))
    for sizes in ((4, 2), (3, 5)):
        video = clips(name, *sizes)
        contract.assert_same(tuple(program.module()(video)), model(video), rtol=1e-4, atol=1e-5)


def checkpoints(name: str, placement: str) -> None:
    contract.test_checkpointing_changes_neither_output_nor_gradients(name, placement)


def copies(name: str, placement: str) -> None:
    contract.test_copies_are_equal_and_independent(name, placement, copy.deepcopy)


def saves_and_loads(name: str, placement: str) -> None:
    contract.test_copies_are_equal_and_independent(name, placement, contract.through_pickle)
    contract.test_unpatching_restores_types_keys_attributes_and_outputs(name, placement)
    contract.test_every_new_key_says_temporal_and_pretrained_keys_keep_their_names(name, placement)
    contract.test_an_image_checkpoint_loads_before_and_after_patching(name)


CHECKS: dict[str, Callable[[str, str], None]] = {
    "equal at init": equals_at_init,
    "frames": takes_any_number_of_frames,
    "gradients": has_the_gradients_of_the_plain_model,
    "checkpointing": checkpoints,
    "copy": copies,
    "save/load": saves_and_loads,
    "compile": compiles,
    "export": exports,
}


def check(name: str, placement: str, column: str) -> str:
    """ "yes", "refused", or what went wrong."""
    if placement == "replace" and not CASES[name].replace:
        return "refused"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CHECKS[column](name, placement)
    except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error).strip()[:300]}"
    return "yes"


# ---- on two processes -----------------------------------------------------------------------------------------------


def check_on_two(column: str, jobs: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """DDP or FSDP2 on two gloo processes, for (model, placement) pairs: the gradients of one process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_two, (column, jobs, folder), nprocs=2)
        return torch.load(Path(folder) / "found.pt", weights_only=True)


def _two(rank: int, column: str, jobs: list[tuple[str, str]], folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, placement in jobs:
        try:
            _gradients_on_two(rank, column, name, placement)
            found[name, placement] = "yes"
        except Exception as error:
            found[name, placement] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        torch.distributed.barrier()
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def _gradients_on_two(rank: int, column: str, name: str, placement: str) -> None:
    single, video = encoder(name, patched(name, placement)), clips(name)
    parallel = copy.deepcopy(single)
    torch.stack([o.square().mean() for o in contract.outputs(single(video))]).sum().backward()
    if column == "DDP":
        runner: nn.Module = nn.parallel.DistributedDataParallel(parallel, find_unused_parameters=True)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in (*attrgetter(CASES[name].blocks)(parallel), *parallel.temporal_encoder.blocks):
            fully_shard(block)
        runner = fully_shard(parallel)
    outputs = contract.outputs(runner(video[rank : rank + 1]))
    torch.stack([o.square().mean() for o in outputs]).sum().backward()
    expected = dict(single.named_parameters())
    for key, parameter in parallel.named_parameters():
        grad = parameter.grad
        if grad is None:
            assert expected[key].grad is None or not expected[key].grad.any(), key
            continue
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, expected[key].grad, rtol=1e-3, atol=1e-5, msg=key)


# ---- timm -----------------------------------------------------------------------------------------------------------


def small(name: str) -> Case:
    """A small variant of a plain ViT of timm: as narrow and shallow as its architecture function lets it be."""
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    stem = getattr(model, "patch_embed", None)
    patch = getattr(stem, "patch_size", (16, 16))
    patch = patch[0] if isinstance(patch, (tuple, list)) else patch
    sizes = {"depth": 3, "embed_dim": 48, "num_heads": 4}
    pixels = {"img_size": 64 if hasattr(stem, "backbone") else 2 * patch}  # a convolutional stem reduces more
    grouped = {"num_kv_heads": (2, 2, 4)}  # of models with grouped-query attention in some blocks
    tries: list[dict[str, Any]] = [sizes | pixels, sizes | pixels | grouped, sizes, pixels | {"depth": 3}, {"depth": 3}]
    for options in tries:
        try:
            with torch.device("meta"):
                made: Any = timm.create_model(name, num_classes=5, **options)
        except (TypeError, ValueError, AssertionError, RuntimeError):
            continue
        size = options.get("img_size") or made.default_cfg["input_size"][1]
        reasons = [family_file.cannot_replace(made, made.blocks[0]), family_file.cannot_copy(made, made.blocks[0])]
        return Case(
            partial(timm.create_model, name, num_classes=5, **options),
            size=size,
            replace=reasons[0] is None,
            copy=reasons[1] is None,
            like=_like(made.blocks[-1]),
            heads=_heads(made.blocks[-1]),
        )
    raise ValueError(f"{name} cannot be made small")


def _heads(block: nn.Module) -> int:
    return next(module.num_heads for module in reversed(list(block.modules())) if hasattr(module, "num_heads"))


def _like(block: nn.Module) -> dict[str, str]:
    """Where the norms and the activation of a block of timm are."""
    names = {name for name, _ in block.named_modules()}
    norm = next(n for n in ("norm1", "in_norm", "attns.0.norm") if n in names)
    act = next((n for n in ("mlp.act", "mlp_act", "ffns.0.mlp.act") if n in names), "")
    like = TIMM_LIKE | {"ln_1": norm, "ln_2": norm, "mlp.act": act}
    attn: Any = getattr(block, "attn", block)
    part = "attn." if attn is not block else ""
    if isinstance(getattr(attn, "q_norm", None), nn.Module) and not isinstance(attn.q_norm, nn.Identity):
        like |= {"attn.q_norm": f"{part}q_norm", "attn.k_norm": f"{part}k_norm"}
    return like


def walk() -> Iterator[tuple[str, type[nn.Module] | None, str]]:
    """Every model of timm: its name, its class if it is a plain ViT, and why it is refused otherwise."""
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        try:
            family_file.find(model)
            yield name, type(model), ""
        except TypeError as error:
            yield name, None, f"{type(model).__name__}: {str(error).split('): ')[1].split(';')[0]}"


def register(name: str) -> str:
    """Make a model of timm a case of the suites; returns the case's name."""
    CASES[f"timm/{name}"] = small(name)
    return f"timm/{name}"


def kind(case: str) -> str:
    """What two models of equal kind share: the modules of their small variants, sizes included."""
    with torch.device("meta"):
        model = CASES[case].build()
    return f"{type(model).__name__} {model!r} {CASES[case].size}"


# ---- the whole ------------------------------------------------------------------------------------------------------


def check_families() -> list[dict[str, str]]:
    rows = []
    for title, name in tqdm(FAMILIES.items(), desc="families"):
        for placement in PLACEMENTS:
            rows.append({"family": title, "placement": placement} | {c: check(name, placement, c) for c in CHECKS})
    jobs = [(name, p) for name in FAMILIES.values() for p in PLACEMENTS if p != "replace" or CASES[name].replace]
    for column in ("DDP", "FSDP2"):
        found = check_on_two(column, jobs)
        for row in rows:
            row[column] = found.get((FAMILIES[row["family"]], row["placement"]), "refused")
    return rows


def check_timm() -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    plain: dict[str, dict[str, Any]] = {}
    refused: dict[str, list[str]] = {}
    for name, cls, reason in tqdm(walk(), total=len(timm.list_models()), desc="timm"):
        if cls is None:
            refused.setdefault(reason, []).append(name)
            continue
        case = register(name)
        row = plain.setdefault(kind(case), {"class": cls.__name__, "checked": name, "models": []})
        row["models"].append(name)
    for row in tqdm(plain.values(), desc="kinds of plain ViTs"):
        case = f"timm/{row['checked']}"
        columns = [column for column in CHECKS if column not in ("compile", "export")]
        row["found"] = {p: {column: check(case, p, column) for column in columns} for p in PLACEMENTS}
    return list(plain.values()), refused


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from common import RESULTS, save

    with ProcessPoolExecutor(2, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        families_found, timm_found = pool.submit(check_families), pool.submit(check_timm)
        families, (plain, refused) = families_found.result(), timm_found.result()
    save("zoo", families, RESULTS, timm=plain, refused=refused)
    found = [(row["family"], row["placement"], row) for row in families]
    found += [(row["checked"], placement, results) for row in plain for placement, results in row["found"].items()]
    failures = [
        f"{name}, {placement}, {column}: {result}"
        for name, placement, results in found
        for column, result in results.items()
        if column not in ("family", "placement") and result not in ("yes", "refused")
    ]
    count = sum(len(row["models"]) for row in plain)
    print(f"{count} plain ViTs of timm of {len(plain)} kinds, {sum(map(len, refused.values()))} other models refused:")
    for reason, names in refused.items():
        print(f"  {len(names):4d} {reason}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    print("\n".join(failures) or "everything holds")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
