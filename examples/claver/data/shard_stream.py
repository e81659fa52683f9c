"""Shards read from start to end, in a shuffled order that is a function of the seed and the epoch.

An epoch is all shards one after the other, in shuffled order. Each process has an equal part of this sequence of samples, and
of its part each of `LANES` lanes has a part: a stream of its own with a buffer that shuffles. Batch `b` of a process comes from
lane `b % LANES`, whichever worker reads that lane, so that the number of workers changes nothing. Whole shards for processes and
workers, as WebDataset's own splitters deal them, would leave some with more steps than others; so a shard in which a part
ends is read by two.
"""

from __future__ import annotations

import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from .lists import DatasetError, Sample
from .shards import shard_key
from .tars import ByteRange, Member

__all__ = ["BUFFER", "LANES", "batches_of_lane", "shard_bounds", "shard_ranges", "stream_samples"]

LANES = 24  # of a process; the number of its workers divides it
BUFFER = 48  # videos of a lane, as they are in the file, that wait to be drawn from


def batches_of_lane(batches: int, lane: int) -> int:
    """How many of the first `batches` batches of a process are of one lane."""
    return (batches - lane + LANES - 1) // LANES


def shard_ranges(lengths: Sequence[int], start: int, stop: int, seed: str) -> list[tuple[int, int, int]]:
    """Places `start .. stop` of an epoch, as `(shard, first, last + 1)` of the samples in each shard of these lengths."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    ranges, begin = [], 0
    for shard in order:
        first, last = max(start - begin, 0), min(stop - begin, lengths[shard])
        if first < last:
            ranges.append((shard, first, last))
        begin += lengths[shard]
    return ranges


def shard_bounds(samples: Sequence[Sample]) -> list[int]:
    """Where in the samples of `shards.read_shards` each shard begins, and their number."""
    archives = [getattr(sample.path, "archive", None) for sample in samples]
    return [i for i, name in enumerate(archives) if i == 0 or name != archives[i - 1]] + [len(samples)]


def stream_samples(
    samples: Sequence[Sample], bounds: Sequence[int], start: int, stop: int, key: tuple[int, int, int]
) -> Iterator[tuple[int, Member]]:
    """Indices and videos, in memory, of places `start .. stop` of an epoch, shuffled in a buffer.

    Args:
        samples: of `shards.read_shards`, in its order.
        bounds: of the shards, from `shard_bounds`.
        start: place in the epoch's sequence of samples.
        stop: the place after the last.
        key: seed, epoch and number of the lane, of which the order is a function.

    Raises:
        DatasetError: a shard that is not any more what it was when `samples` were read.
        ImportError: webdataset is missing.
    """
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("training from shards needs webdataset: pip install webdataset") from error
    seed, epoch, lane = key
    lengths = [b - a for a, b in pairwise(bounds)]
    ranges = shard_ranges(lengths, start, stop, f"shards {seed} {epoch}")
    order = random.Random(f"samples {seed} {epoch} {lane}")
    yield from webdataset.DataPipeline(
        lambda: (
            item
            for shard, first, last in ranges
            for item in _read(samples, range(bounds[shard] + first, bounds[shard] + last), bounds[shard + 1])
        ),
        webdataset.shuffle(BUFFER, initial=BUFFER, rng=order),
    )


def _read(samples: Sequence[Sample], part: range, shard_end: int) -> Iterator[tuple[int, Member]]:
    """Read a part of one shard, which ends before sample `shard_end`, without seeking."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    members = [member for member in (samples[i].path for i in part) if isinstance(member, Member)]
    shard = members[0].archive
    following = samples[part.stop].path if part.stop < shard_end else None
    try:
        with open(shard, "rb") as file:
            end = following.start if isinstance(following, Member) else os.path.getsize(shard)
            files = tar_file_iterator(ByteRange(file, members[0].start, end))
            found = group_by_keys({**each, "__url__": shard} for each in files)
            for index, member, sample in zip(part, members, found, strict=True):
                key = shard_key(member.name)
                if sample["__key__"] != key:
                    raise ValueError(f"{sample['__key__']} lies in the place of {key}")
                yield index, replace(member, data=sample[member.name[len(key) + 1 :].lower()])
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        raise DatasetError(f"{shard}: is not what it was when the run began ({error}); start it again") from error
