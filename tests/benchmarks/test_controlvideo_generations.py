"""Whole videos in turns: methods run and are undone, full steps cost what they should, content is held to plain's."""

import sys

import pytest
import torch
from traces import traces

from benchmarks.video import controlvideo_generations as benchmark
from benchmarks.video.controlvideo_speed import make_pipeline


def test_methods_take_turns_and_are_undone():
    pipe = make_pipeline(torch.device("cpu"), **benchmark.TINY)
    before = [traces(part) for part in (pipe.unet, pipe.controlnet)]
    names = (
        "plain",
        "each 0.25, full_every 2",
        "each 0.25, full_every 5",
        "joint 0.25, full_every 3",
        # Its first three steps are whole.
        "preset fast",
    )
    plain, *rows = benchmark.measure(pipe, 2, 256, {name: benchmark.METHODS[name] for name in names}, 4, 1)
    assert [traces(part) for part in (pipe.unet, pipe.controlnet)] == before
    assert plain["psnr"] is None and plain["speed_up"] == plain["fewer_flops"] == 1 and plain["content"] == "yes"
    assert [row["method"] for row in rows] == list(names[1:])
    assert all(10 < row["psnr"] < 100 and row["fewer_flops"] > 1 and row["seconds"] > 0 for row in rows)
    of = {row["method"]: row["fewer_flops"] for row in rows}
    assert of["each 0.25, full_every 2"] < of["joint 0.25, full_every 3"] < of["each 0.25, full_every 5"]


def test_content_is_held_against_plain():
    rows = [{"warping": 2.0, "edges": 0.5}, {"warping": 2.09, "edges": 0.48}, {"warping": 1.8, "edges": 0.5}]
    rows += [{"warping": 2.0, "edges": 0.53}]
    benchmark.beside_plain(rows)
    assert [row["content"] for row in rows] == ["yes", "yes", "no", "no"]
    assert rows[2]["warping_of_plain"] == pytest.approx(0.9)
    still = [{"warping": 0.0, "edges": 0.5}]
    benchmark.beside_plain(still)
    assert still[0]["warping_of_plain"] is None and still[0]["content"] == "no"


def test_a_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "save", None)
    monkeypatch.setattr(sys, "argv", ["controlvideo_generations", "--tiny", "--methods", "preset fast"])
    benchmark.main()
    assert "| plain |" in (out := capsys.readouterr().out) and "| preset fast |" in out
