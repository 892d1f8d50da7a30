"""Clips: every frame once, upright, in its colors and its time, and one clear error for what is no clip."""

import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from video_clips import moving_square

from ailurus_hf import AiluRusError
from ailurus_hf.video import open_clip, write_video
from ailurus_hf.video.reading import exact_rate

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (250, 200, 10)]


def ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def numbered(count: int, size: tuple[int, int] = (32, 24)) -> list[Image.Image]:
    """Gray frames that tell their numbers."""
    return [Image.new("RGB", size, (10 * number,) * 3) for number in range(count)]


def numbers(frames: list[Image.Image]) -> list[int]:
    return [round(np.asarray(frame).mean() / 10) for frame in frames]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name in ("n.mp4", "n.gif", "n"):
        write_video(folder / name, numbered(20), fps=10)
    return folder


@pytest.mark.parametrize("name", ["n.mp4", "n.gif", "n"])
class TestEverySource:
    def test_every_frame_once_and_again(self, clips: Path, name: str) -> None:
        clip = open_clip(clips / name)
        assert clip.size == (32, 24)
        assert clip.fps == (None if name == "n" else 10)
        assert numbers(list(clip)) == numbers(list(clip)) == list(range(20))

    @pytest.mark.parametrize(
        ("options", "taken"),
        [
            ({"every": 3}, [0, 3, 6, 9, 12, 15, 18]),
            ({"every": 3, "max_frames": 4}, [0, 3, 6, 9]),
            ({"max_frames": 5}, [0, 1, 2, 3, 4]),
            ({"max_frames": 99, "min_frames": 20}, list(range(20))),
        ],
    )
    def test_some_of_the_frames(self, clips: Path, name: str, options: dict, taken: list[int]) -> None:
        clip = open_clip(clips / name, **options)
        assert numbers(list(clip)) == taken
        if name != "n":
            assert clip.fps == Fraction(10, options.get("every", 1))

    def test_too_few_frames(self, clips: Path, name: str) -> None:
        with pytest.raises(AiluRusError, match=r"too few frames: 20, but 21 are needed"):
            list(open_clip(clips / name, min_frames=21))


@pytest.mark.parametrize("name", ["n.mp4", "n.gif"])
@pytest.mark.parametrize("fps", [5, 20, 4])
def test_another_frame_rate_keeps_the_time(clips: Path, name: str, fps: int) -> None:
    clip = open_clip(clips / name, fps=fps)
    frames = numbers(list(clip))
    assert clip.fps == fps
    assert abs(len(frames) - 2 * fps) <= 1  # of two seconds
    assert frames[: 2 * fps] == [number * 10 // fps for number in range(2 * fps)]  # what is shown at each time


def test_the_rate_of_a_folder_is_what_it_is_said_to_be(clips: Path) -> None:
    clip = open_clip(clips / "n", fps=12.5)
    assert clip.fps == 12.5 and len(list(clip)) == 20


def test_frames_are_decoded_as_they_are_asked_for(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    read_frames = imageio_ffmpeg.read_frames

    def counted(*args: object, **kwargs: object) -> Iterator[object]:
        for item in read_frames(*args, **kwargs):
            taken.append(item)
            yield item

    monkeypatch.setattr(imageio_ffmpeg, "read_frames", counted)
    clip = open_clip(clips / "n.mp4")
    assert len(taken) == 1  # the header
    running = iter(clip)
    next(running), next(running)
    assert len(taken) == 1 + 1 + 2
    running.close()
    assert len(list(open_clip(clips / "n.mp4", max_frames=3))) == 3
    assert len(taken) == 4 + 1 + 1 + 3


@pytest.mark.parametrize(("suffix", "tolerance"), [(".mp4", 2), (".mov", 2), ("", 0)])
def test_colors_stay(tmp_path: Path, suffix: str, tolerance: int) -> None:
    frames = [Image.new("RGB", (40, 30), color) for color in COLORS]
    write_video(tmp_path / f"colors{suffix}", frames, fps=5)
    for color, frame in zip(COLORS, open_clip(tmp_path / f"colors{suffix}"), strict=True):
        assert np.abs(np.asarray(frame).astype(int) - color).max() <= tolerance


def test_full_range_video_has_its_colors(tmp_path: Path) -> None:
    options = ["-vf", "scale=out_range=pc", "-color_range", "pc", "-pix_fmt", "yuvj420p"]
    ffmpeg("-f", "lavfi", "-i", "color=0xFAC80A:size=32x24:duration=1", *options, tmp_path / "full.mp4")
    frame = next(iter(open_clip(tmp_path / "full.mp4")))
    assert np.abs(np.asarray(frame).astype(int) - (250, 200, 10)).max() <= 3


def test_rotation_flags_are_followed(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (48, 32), "black") for _ in range(3)]
    for frame in frames:
        frame.paste("white", (0, 0, 48, 8))  # a bar above
    write_video(tmp_path / "upright.mp4", frames)
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "upright.mp4", "-c", "copy", tmp_path / "turned.mp4")
    clip = open_clip(tmp_path / "turned.mp4")
    pixels = np.asarray(next(iter(clip)))
    assert clip.size == (32, 48) and pixels.shape == (48, 32, 3)
    assert pixels[:, 2].min() > 200 and pixels[:, -4:].max() < 50  # turned against the clock: the bar is left


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=32x32:duration=1,setsar=2/1", tmp_path / "wide.mp4")
    clip = open_clip(tmp_path / "wide.mp4")
    assert clip.size == (64, 32) == next(iter(clip)).size


def test_frames_of_uneven_times_are_all_read_or_taken_by_their_times(tmp_path: Path) -> None:
    # The first five of ten frames stay twice as long.
    times = "setpts='if(lt(N,5),N*0.2,1+(N-5)*0.1)/TB'"
    options = ["-vf", f"settb=1/1000,{times}", "-fps_mode", "vfr"]
    write_video(tmp_path / "even.mp4", numbered(10), fps=10)
    ffmpeg("-i", tmp_path / "even.mp4", *options, tmp_path / "uneven.mkv")
    assert numbers(list(open_clip(tmp_path / "uneven.mkv"))) == list(range(10))
    by_time = numbers(list(open_clip(tmp_path / "uneven.mkv", fps=10)))
    assert by_time[:10] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_rates_of_television_are_exact(tmp_path: Path) -> None:
    assert exact_rate(23.98) == Fraction(24000, 1001) and exact_rate(29.97) == Fraction(30000, 1001)
    assert exact_rate(24.0) == 24 and exact_rate(12.5) == Fraction(25, 2) and exact_rate(23.9) == Fraction(239, 10)
    write_video(tmp_path / "tv.mp4", numbered(4), fps=23.98)
    assert open_clip(tmp_path / "tv.mp4").fps == Fraction(24000, 1001)


def test_pictures_of_all_kinds_in_a_folder(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 257 * 90, np.uint16)).save(tmp_path / "f1.png")  # 16 bits
    Image.new("L", (6, 4), 90).save(tmp_path / "f2.png")
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(tmp_path / "f10.png")  # transparent: white
    turned = Image.new("RGB", (4, 6), (90, 90, 90))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "f11.jpg", exif=exif, quality=100)
    (tmp_path / "notes.txt").write_text("no picture")
    frames = list(open_clip(tmp_path))
    assert [frame.size for frame in frames] == [(6, 4)] * 4
    assert [np.asarray(frame).mean().round() for frame in frames] == [90, 90, 255, 90]


def test_frames_of_several_sizes(tmp_path: Path) -> None:
    for name, size in (("a", (6, 4)), ("b", (6, 5))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    with pytest.raises(AiluRusError, match="frame 1 is 6×5, those before are 6×4"):
        list(open_clip(tmp_path))


class TestBrokenFiles:
    @pytest.fixture(autouse=True)
    def make_files(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        frames = [Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(20)]
        write_video(tmp_path / "whole.mp4", frames)
        whole = (tmp_path / "whole.mp4").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.mp4").write_text("no video")
        (tmp_path / "empty.mp4").write_bytes(b"")
        (tmp_path / "text.gif").write_text("no animation")
        (tmp_path / "nothing").mkdir()
        ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "sound.mp4")
        write_video(tmp_path / "n", numbered(3))
        (tmp_path / "n/00001.png").write_bytes((tmp_path / "n/00001.png").read_bytes()[:60])

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("cut.mp4", r"breaks off after \d+ of about 20 frames"),
            ("text.mp4", "text.mp4 is not a readable video: Invalid data found"),
            ("empty.mp4", "empty.mp4 is not a readable video"),
            ("sound.mp4", "sound.mp4 is not a readable video: it holds sound and no moving pictures"),
            ("text.gif", "text.gif is not a readable animation"),
            ("nothing", "no picture in folder"),
            ("nowhere.mp4", "no such file or folder"),
            ("n", "00001.png is not a readable image"),
        ],
    )
    def test_get_one_line(self, tmp_path: Path, name: str, told: str) -> None:
        with pytest.raises(AiluRusError, match=told) as caught:
            list(open_clip(tmp_path / name))
        assert "\n" not in str(caught.value)

    def test_the_frames_before_the_damage_can_be_had(self, tmp_path: Path) -> None:
        assert len(list(open_clip(tmp_path / "cut.mp4", max_frames=3))) == 3

    def test_a_picture_that_ends_before_its_sound_is_whole(self, tmp_path: Path) -> None:
        sound = ["-f", "lavfi", "-i", "sine=duration=9"]
        ffmpeg("-i", tmp_path / "whole.mp4", *sound, "-c:v", "copy", tmp_path / "longer_sound.mp4")
        assert len(list(open_clip(tmp_path / "longer_sound.mp4"))) == 20


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
        ({"fps": 0}, "fps must be above 0, got 0"),
        ({"fps": float("nan")}, "fps must be above 0, got nan"),
        ({"fps": 5, "every": 2}, "give one, got every=2 and fps=5"),
        ({"max_frames": 3, "min_frames": 4}, "max_frames must be at least min_frames 4, got 3"),
    ],
)
def test_wrong_choices(clips: Path, options: dict, told: str) -> None:
    with pytest.raises(AiluRusError, match=told):
        open_clip(clips / "n.mp4", **options)


def test_a_missing_extra_is_named(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(AiluRusError, match=r'imageio_ffmpeg .*: pip install "ailurus-hf\[video\]"'):
        open_clip(clips / "n.mp4")
    assert len(list(open_clip(clips / "n"))) == 20  # a folder needs no ffmpeg


def test_a_real_motion_survives_the_way_through_a_file(tmp_path: Path) -> None:
    frames = moving_square()
    write_video(tmp_path / "square.mp4", frames, fps=12)
    for before, after in zip(frames, open_clip(tmp_path / "square.mp4"), strict=True):
        assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).mean() < 4


@pytest.fixture(scope="module")
def covers(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    folder = tmp_path_factory.mktemp("covers")
    cover, sound, film = folder / "cover.jpg", folder / "sound.wav", clips / "n.mp4"
    Image.new("RGB", (64, 64), "red").save(cover)
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", sound)
    attached = ("-attach", cover, "-metadata:s:t", "mimetype=image/jpeg")
    ffmpeg("-i", film, "-c", "copy", *attached, folder / "attached.mkv")
    first = ("-i", cover, "-i", film, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg(*first, folder / "first.mp4")
    ffmpeg(*first, folder / "first.mkv")  # which forgets that it is a cover
    ffmpeg("-i", sound, *attached, folder / "sound.mkv")
    both = ("-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", sound, "-i", cover, *both, folder / "sound.m4a")
    return folder


@pytest.mark.parametrize("name", ["attached.mkv", "first.mp4", "first.mkv"])
def test_a_cover_is_not_the_film(covers: Path, name: str) -> None:
    clip = open_clip(covers / name)
    assert (clip.size, clip.fps, numbers(list(clip))) == ((32, 24), 10, list(range(20)))


@pytest.mark.parametrize("name", ["sound.wav", "sound.mkv", "sound.m4a"])
def test_sound_with_a_cover_is_no_film(covers: Path, name: str) -> None:
    with pytest.raises(AiluRusError, match="it holds sound and no moving pictures"):
        open_clip(covers / name)


def test_notes_of_macos_among_the_frames_are_left_out(tmp_path: Path) -> None:
    write_video(tmp_path / "frames", numbered(3))
    (tmp_path / "frames/._00001.png").write_bytes(b"\0\5\26\7")
    assert numbers(list(open_clip(tmp_path / "frames"))) == [0, 1, 2]


def test_frames_of_16_bits(tmp_path: Path) -> None:
    for number in range(2):
        values = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (24, 1))
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    frame = next(iter(open_clip(tmp_path)))
    assert np.array_equal(np.asarray(frame)[0, :, 0], np.round(np.linspace(0, 65535, 32).astype(int) / 257))
