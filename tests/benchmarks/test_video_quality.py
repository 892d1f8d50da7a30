"""The benchmark of videos: clips show what their captions say and stay still where nothing moves; its rows agree."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("skimage")
pytest.importorskip("tomesd")

from traces import traces
from video_clips import moving_square, save_pipeline

from ailurus_hf.video import write_video
from benchmarks import harness
from benchmarks.video import video_quality as benchmark

METHODS = [
    "plain",
    "each 0.5",
    "each 0.125",
    "joint 0.25",
    "joint 0.25, every 4 steps",
    "tomesd 0.5",
    "VidToMe",
    "preset fast",
]


def clips(number, frames=4, seed=0):
    rng = np.random.default_rng(seed)
    return [benchmark.moving_shapes(rng, frames) for _ in range(number)]


def test_drawn_clips_show_their_captions_and_move_over_a_still_ground():
    for clip in clips(12):
        assert clip.adherence(clip.frames) == 1 and all(clip.facts(clip.frames))
        still = clip.adherence([clip.frames[0]] * 4)
        assert still < 0.9, "the wanted edges move"
        frames = np.stack([np.asarray(frame) for frame in clip.frames])
        same = (frames == frames[:1]).all((0, 3))
        assert 0.5 < same.mean() < 0.995
        assert all((a != b).any() for a, b in pairwise(frames))


def test_facts_of_another_clip_are_not_shown():
    one, other = clips(2, seed=1)
    assert one.prompt != other.prompt and not all(one.facts(other.frames))


def test_a_clip_compared_with_itself():
    one, other = clips(2)
    found = benchmark.scores([one.frames], [one.frames], [one])
    assert found["psnr"] == 100 and found["ssim"] == pytest.approx(1) and found["facts"] == found["edges"] == 1
    flicker = [frame.point(lambda value, n=n: value * (10 - n % 2) // 10) for n, frame in enumerate(one.frames)]
    worse = benchmark.scores([flicker], [one.frames], [one])
    assert worse["warping"] > found["warping"] + 1 and worse["psnr"] < 40
    wrong = benchmark.scores([other.frames], [one.frames], [one])
    assert wrong["edges"] < 0.5 and wrong["facts"] < 1


def test_methods_take_turns_and_are_undone(tmp_path, monkeypatch, capsys):
    save_pipeline(tmp_path, levels=4)
    pipe = benchmark.load(str(tmp_path / "model"))
    monkeypatch.setattr(benchmark, "load", lambda folder: pipe)
    monkeypatch.setattr(benchmark, "save", lambda *args: harness.save(*args, folder=tmp_path))
    write_video(tmp_path / "square.mp4", moving_square(8))
    before = [traces(part) for part in (pipe.unet, pipe.controlnet)]
    options = ["--clips", "2", "--frames", "3", "--steps", "4", "--repeats", "1", "--output", str(tmp_path)]
    more = ["--videos", str(tmp_path / "square.mp4"), "--methods", *METHODS]
    monkeypatch.setattr(sys, "argv", ["video_quality", str(tmp_path / "model"), *options, *more])
    benchmark.main()

    assert [traces(part) for part in (pipe.unet, pipe.controlnet)] == before
    (file,) = tmp_path.glob("cpu/*.json")
    result = json.loads(file.read_text())
    assert result["frames"] == 3 and result["steps"] == 4
    for kind, number in (("shapes", 2), ("square", 1)):
        rows = {row["method"]: row for row in result["rows"] if row["clips"] == kind}
        assert list(rows) == METHODS
        plain = rows.pop("plain")
        assert plain["psnr"] is None and plain["fewer_flops"] == plain["speed_up"] == 1
        for name, row in rows.items():
            assert row["number"] == number and 5 < row["psnr"] < 100 and row["ssim"] < 1, name
            assert row["warping"] >= 0 and 0 <= row["edges"] <= 1 and row["seconds"] > 0 and row["fewer_flops"] > 1
            held = all(abs(row[f"{n}_of_plain"] - 1) <= 0.05 for n in ("warping", "edges"))
            assert row["warping_of_plain"] == pytest.approx(row["warping"] / plain["warping"])
            assert row["content"] == ("yes" if held else "no")
            assert (row["facts"] is not None) == (kind == "shapes")
        assert rows["each 0.125"]["gflops"] < rows["each 0.5"]["gflops"]
        for suffix in ("png", "mp4"):
            assert (tmp_path / f"model-{kind}-video.{suffix}").exists()
    assert "warping error" in capsys.readouterr().out
