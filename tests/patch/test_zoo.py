"""A sample of the zoo: one model of timm for each class of plain ViTs, and the stored result of the whole (`make zoo`)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import zoo

STORED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "zoo.json").read_text())
SAMPLE = (
    "vit_base_patch16_224",
    "deit3_base_patch16_224",
    "vit_base_r26_s32_224",
    "eva02_base_patch14_224",
    "beitv2_base_patch16_224",
    "vit_relpos_base_patch16_224",
    "samvit_base_patch16",
    "naflexvit_base_patch16_gap",
    "cait_xxs24_224",
)


@pytest.mark.parametrize("placement", zoo.PLACEMENTS)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_plain_vit_of_timm_keeps_everything(name: str, placement: str) -> None:
    case = zoo.register(name)
    for column in ("equal at init", "frames", "gradients", "checkpointing", "copy", "save/load"):
        assert zoo.check(case, placement, column) in ("yes", "refused"), column


@pytest.mark.parametrize("name", ["timm-eva02", "clip", "transformers-ViT", "own"])
@pytest.mark.parametrize("placement", zoo.PLACEMENTS)
def test_families_compile_and_export(name: str, placement: str) -> None:
    for column in ("compile", "export"):
        assert zoo.check(name, placement, column) == "yes", column


def test_ddp_and_fsdp2_have_the_gradients_of_one_process() -> None:
    jobs = [("timm-eva02", "append"), ("transformers-ViT", "interleave"), ("own", "replace")]
    for column in ("DDP", "FSDP2"):
        assert zoo.check_on_two(column, jobs) == dict.fromkeys(jobs, "yes")


def test_the_stored_zoo_holds_every_family_and_nothing_failed() -> None:
    assert {row["family"] for row in STORED["rows"]} == set(zoo.FAMILIES)
    for row in STORED["rows"]:
        assert set(row) == {"family", "placement", *zoo.CHECKS, "DDP", "FSDP2"}
        assert all(value in ("yes", "refused") for key, value in row.items() if key not in ("family", "placement")), row
    for kind in STORED["timm"]:
        results = {value for found in kind["found"].values() for value in found.values()}
        assert results <= {"yes", "refused"}, kind
    assert all(re.fullmatch(r"\w+: it (is|has) .*", reason) for reason in STORED["refused"])
