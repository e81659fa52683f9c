"""Videos in tar files are read where they lie, and a tar file that is damaged or reaches out of its folder is refused."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from claver.data.lists import DatasetError
from claver.data.tars import ByteRange, read_members
from claver.data.video import VideoError, probe, read_frames
from video_files import write_video


def pack(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file of `(name, content)` and of members without content."""
    with tarfile.open(path, "w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_in_place(form: int, tmp_path: Path) -> None:
    long = "a/" + "long " * 18 + "name.mp4"
    contents = [("./b/two.mp4", b"22"), (long, b"l" * 1000), ("été/empty.mp4", b""), ("one.mp4", os.urandom(600))]
    path = pack(tmp_path / "a.tar", special("b", tarfile.DIRTYPE), *contents, form=form)
    members = read_members(path)
    assert [member.name for member in members] == ["b/two.mp4", long, "été/empty.mp4", "one.mp4"]
    assert str(members[0]) == f"{path}/b/two.mp4"
    for member, (_, content) in zip(members, contents, strict=True):
        with member.open() as file:
            assert file.read() == content
            assert member.size == file.seek(0, os.SEEK_END) == len(content)


def test_hidden_members_are_left_out(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", ("a/._x.mp4", b"1"), (".DS_Store", b"1"), (".git/x.mp4", b"1"), ("a/x.mp4", b"1"))
    assert [member.name for member in read_members(path)] == ["a/x.mp4"]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("/etc/x.mp4", b"1"), "absolute path"),
        (("C:/x.mp4", b"1"), "absolute path or one of another system"),
        (("a\\x.mp4", b"1"), "absolute path or one of another system"),
        (("../x.mp4", b"1"), "leaves the folder"),
        (("a/../../x.mp4", b"1"), "leaves the folder"),
        (special("a/x.mp4", tarfile.SYMTYPE, "/etc/passwd"), r"is a link \(to /etc/passwd\)"),
        (special("a/x.mp4", tarfile.LNKTYPE, "a/b.mp4"), r"is a link \(to a/b.mp4\)"),
        (special("a/x.mp4", tarfile.CHRTYPE), "neither a file nor a folder"),
        (special("../a", tarfile.DIRTYPE), "leaves the folder"),
        (("a/b.mp4", b"1"), "twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", None) or value[0],
)
def test_a_member_that_leaves_its_folder_is_refused_by_name(
    member: tuple[str, bytes] | tarfile.TarInfo, reason: str, tmp_path: Path
) -> None:
    path = pack(tmp_path / "a.tar", ("a/b.mp4", b"1"), member, ("a/c.mp4", b"1"))
    name = member.name if isinstance(member, tarfile.TarInfo) else member[0]
    with pytest.raises(DatasetError, match=rf"a\.tar: 1 members are refused:\n  .*{reason}") as error:
        read_members(path)
    assert [problem for problem, _ in error.value.problems] == [name]


def test_a_truncated_or_damaged_archive_is_an_error_wherever_it_is_hit(tmp_path: Path) -> None:
    whole = pack(tmp_path / "a.tar", *((f"a/{i}.mp4", bytes([i + 1]) * 700) for i in range(5)))
    data = whole.read_bytes()
    end = 5 * (512 + 1024)
    assert len(read_members(whole)) == 5
    cut = tmp_path / "cut.tar"
    for size in [0, 100, 512, 513, 1200, 1536, 2000, 3072, end, end + 100]:
        cut.write_bytes(data[:size])
        with pytest.raises(DatasetError, match=r"cut\.tar: (no plain tar file|the file is truncated)"):
            read_members(cut)
    for member in range(5):
        damaged = bytearray(data)
        damaged[member * 1536 + 10] ^= 0xFF
        cut.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"cut\.tar: (no plain tar file|the file is damaged)"):
            read_members(cut)
    cut.write_bytes(data + data)
    with pytest.raises(DatasetError, match=rf"goes on after its end mark at byte {end}"):
        read_members(cut)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_archive_is_refused_with_what_to_do(mode: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        archive.addfile(tarfile.TarInfo("a/x.mp4"))
    with pytest.raises(DatasetError, match=r"a\.tar: no plain tar file.*must be unpacked and packed with tar cf"):
        read_members(tmp_path / "a.tar")
    with pytest.raises(DatasetError, match=r"absent\.tar: cannot be read \(No such file"):
        read_members(tmp_path / "absent.tar")


def test_a_byte_range_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    file = ByteRange(open(path, "rb", buffering=0), 20, 30)  # noqa: SIM115
    assert file.read() == bytes(range(20, 30))
    assert file.read(1) == b""
    assert file.seek(-3, os.SEEK_END) == 7
    assert file.read(100) == bytes([27, 28, 29])
    assert file.seek(2) == 2
    assert file.seek(3, os.SEEK_CUR) == file.tell() == 5
    assert file.read(2) == bytes([25, 26])
    assert file.seek(50) == 50
    assert file.read(1) == b""
    with pytest.raises(ValueError, match="cannot seek"):
        file.seek(-1)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mkv", "libx264"), ("a.ts", "libx264")]
)
def test_frames_of_a_member_are_those_of_the_file(name: str, codec: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / name, 30, codec=codec)
    path = pack(tmp_path / "a.tar", ("a/other.mp4", os.urandom(999)), (f"a/{name}", video.read_bytes()), ("z", b"z"))
    member = read_members(path)[1]
    loaded = member.__class__(member.archive, member.name, 0, member.size, data=video.read_bytes())
    expected = probe(video)
    for source in (member, loaded):
        info = probe(source)
        assert (info.num_frames, info.timestamps, info.keyframes) == (30, expected.timestamps, expected.keyframes)
        assert np.array_equal(read_frames(info, [29, 3, 14]).numpy(), read_frames(video, [29, 3, 14]).numpy())


def test_a_broken_member_is_an_error_with_its_name(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4", 30, muxing={"movflags": "faststart"}).read_bytes()
    members = [("a/cut.mp4", data[: len(data) * 3 // 4]), ("a/empty.mp4", b""), ("a/text.mp4", b"no video" * 99)]
    path = pack(tmp_path / "a.tar", *members, ("a/last.mp4", data))
    cut, empty, text, last = read_members(path)
    with pytest.raises(
        VideoError, match=r"a\.tar/a/cut\.mp4: the file is truncated \(\d+ of \d+ bytes, found \d+ of 30"
    ):
        probe(cut)
    with pytest.raises(VideoError, match=r"a\.tar/a/empty\.mp4: the file is empty"):
        probe(empty)
    with pytest.raises(VideoError, match=r"a\.tar/a/text\.mp4: is not a video file"):
        probe(text)
    assert probe(last).num_frames == 30
    path.unlink()
    with pytest.raises(VideoError, match=r"a\.tar/a/last\.mp4: the tar file is not there any more"):
        probe(last)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_archive_stays_open(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4", 5).read_bytes()
    good, bad = read_members(pack(tmp_path / "a.tar", ("a/good.mp4", data), ("a/bad.mp4", b"no video")))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_frames(good, [1, 4])
        with pytest.raises(VideoError):
            probe(bad)
    assert len(os.listdir("/proc/self/fd")) == before
