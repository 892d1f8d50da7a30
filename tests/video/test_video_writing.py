"""Written videos: whole and playable under their name, or not there; the extension decides."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from video_clips import moving_square

from ailurus_hf import AiluRusError
from ailurus_hf.video import check_output, open_clip, read_comment, write_video

NAMES = ["out.mp4", "out.mov", "out.gif", "out"]


@pytest.mark.parametrize("name", NAMES)
def test_as_many_frames_as_came(tmp_path: Path, name: str) -> None:
    assert write_video(tmp_path / "new" / name, iter(moving_square(5)), fps=10) == 5
    clip = open_clip(tmp_path / "new" / name)
    assert len(list(clip)) == 5 and clip.size == (48, 32) and clip.fps in (10, None)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]  # nothing else is left


@pytest.mark.parametrize("size", [(47, 33), (33, 32), (1, 1)])
def test_an_odd_side_of_an_mp4_has_its_last_line_twice(tmp_path: Path, size: tuple[int, int]) -> None:
    frame = Image.new("RGB", size, (200, 60, 30))
    write_video(tmp_path / "out.mp4", [frame] * 3)
    clip = open_clip(tmp_path / "out.mp4")
    assert clip.size == tuple(side + side % 2 for side in size)
    assert np.abs(np.asarray(next(iter(clip))).astype(int) - (200, 60, 30)).max() <= 3


def test_an_mp4_is_what_players_take(tmp_path: Path) -> None:
    write_video(tmp_path / "out.mp4", moving_square(8), fps=25)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "out.mp4")]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709", told) and " 25 fps" in told
    written = (tmp_path / "out.mp4").read_bytes()
    assert written.index(b"moov") < written.index(b"mdat")  # plays while it loads


@pytest.mark.parametrize("name", ["out.mp4", "out.mov"])
def test_a_comment_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    text = '{"a=b": ";#\\\\ \\"x\\"", "ü": 1.5}\nsecond=line\\'
    write_video(tmp_path / name, moving_square(3), comment=text)
    assert read_comment(tmp_path / name) == text
    write_video(tmp_path / name, moving_square(3))
    assert read_comment(tmp_path / name) is None
    (tmp_path / "text.mp4").write_text("comment=no")
    assert read_comment(tmp_path / "text.mp4") is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError("broken")])
def test_what_is_interrupted_leaves_nothing(tmp_path: Path, name: str, raised: BaseException) -> None:
    def interrupted() -> Iterator[Image.Image]:
        yield from moving_square(4)
        assert not (tmp_path / name).exists()
        raise raised

    with pytest.raises(type(raised) if isinstance(raised, Exception) else raised):
        write_video(tmp_path / name, interrupted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.mp4", "out.gif"])
def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("older")

    def interrupted() -> Iterator[Image.Image]:
        yield from moving_square(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / name, interrupted())
    assert (tmp_path / name).read_text() == "older"
    write_video(tmp_path / name, moving_square(4))
    assert len(list(open_clip(tmp_path / name))) == 4


def test_an_empty_folder_is_filled_and_no_other_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_video(tmp_path / "out", moving_square(2))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png"]
    with pytest.raises(AiluRusError, match="must be a new or an empty folder"):
        write_video(tmp_path / "out", moving_square(3))
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_what_cannot_be_written_is_told_before_a_frame_is_made(tmp_path: Path) -> None:
    def never() -> Iterator[Image.Image]:
        pytest.fail("a frame was asked for")
        yield

    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    for name, told in [
        ("out.avi", "its suffix must be .mp4, .mov, .gif, or none"),
        ("folder.mp4", "it is a folder"),
        ("file", "new or an empty folder"),
        ("file/out.mp4", "cannot write"),
    ]:
        with pytest.raises(AiluRusError, match=told):
            write_video(tmp_path / name, never())
        with pytest.raises(AiluRusError, match=told):
            check_output(tmp_path / name)
    with pytest.raises(AiluRusError, match="fps must be above 0, got -1"):
        write_video(tmp_path / "out.mp4", never(), fps=-1)


@pytest.mark.parametrize("name", NAMES)
def test_no_frames_and_frames_of_several_sizes(tmp_path: Path, name: str) -> None:
    with pytest.raises(AiluRusError, match="no frames to write"):
        write_video(tmp_path / name, [])
    with pytest.raises(AiluRusError, match="frame 2 is 48×33, the first is 48×32"):
        write_video(tmp_path / name, [*moving_square(2), Image.new("RGB", (48, 33))])
    assert list(tmp_path.iterdir()) == []


def test_an_ffmpeg_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ailurus_hf.video.writing.COLORS", ["-frames:v", "2"])  # as a disk that is full after two
    with pytest.raises(AiluRusError, match=r"cannot write .*out.mp4"):
        write_video(tmp_path / "out.mp4", moving_square(12))
    assert list(tmp_path.iterdir()) == []
