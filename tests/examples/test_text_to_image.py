"""The text-to-image example: scenes and the rules that read them, training that goes on where it was, and the folder.

Its benchmark runs on that folder, here of a model that has learned nothing.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_text_to_image as training  # noqa: E402
from shape_models import make_scheduler, make_tokenizer, make_unet, make_vae  # noqa: E402
from shape_scenes import COLORS, SHAPES, WORDS, draw, edge_adherence, edges, random_scene, read  # noqa: E402

SMALL = ["--widths", "32", "64", "--text-width", "32", "--vae-width", "8", "--batch-size", "2", "--look-at", "1"]


def scenes(number, seed=0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(number)]


def test_scenes_come_from_their_seed_alone():
    first, again, others = scenes(4), scenes(4), scenes(4, seed=1)
    assert first == again and first != others
    for a, b in zip(first, again, strict=True):
        assert all(map(torch.equal, draw(a), draw(b)))
    assert {word for scene in scenes(300) for word in scene.caption.split()} == set(WORDS)


@pytest.mark.parametrize("side", [128, 64])
def test_pictures_show_their_captions(side):
    for scene in scenes(60):
        picture, mask = draw(scene, side)
        facts = read(picture, scene)
        assert len(facts) == 1 + 3 * len(scene.things) and all(facts.values()), (scene.caption, facts)
        assert picture.shape == (3, side, side) and 0.01 < mask.float().mean() < 0.5
        assert edge_adherence(picture, edges(mask)) == 1


def with_thing(scene, **fields):
    return dataclasses.replace(scene, things=(dataclasses.replace(scene.things[0], **fields), *scene.things[1:]))


def test_each_fact_is_read_on_its_own():
    for scene in scenes(40):
        picture, thing = draw(scene)[0], scene.things[0]
        used = {t.color for t in scene.things}
        others = {
            "shape 0": with_thing(scene, shape=next(s for s in SHAPES if s != thing.shape)),
            "size 0": with_thing(scene, size="small" if thing.size == "large" else "large"),
            "ground": dataclasses.replace(scene, ground="pink" if scene.ground != "pink" else "teal"),
        }
        for fact, other in others.items():
            assert [name for name, true in read(picture, other).items() if not true] == [fact], other.caption
        # What is not there has no shape and size either.
        false = with_thing(scene, color=next(c for c in COLORS if c not in used))
        assert {n for n, true in read(picture, false).items() if not true} == {"color 0", "shape 0", "size 0"}
    one = next(s for s in scenes(40) if s.things[0].position == "left" and len(s.things) == 1)
    assert not read(draw(one)[0], with_thing(one, position="right"))["color 0"]


def test_edges_are_where_they_are_wanted():
    (picture, mask), (other, _) = (draw(scene) for scene in scenes(2))
    wanted = edges(mask)
    assert 0 < wanted.sum() < mask.sum()
    assert edge_adherence(picture.roll(1, -1), wanted) > 0.99
    assert edge_adherence(picture.roll(7, -1), wanted) < 0.6
    assert edge_adherence(other, wanted) < 0.6
    assert edge_adherence(torch.full_like(picture, 0.5), wanted) == 0


def test_a_word_is_a_token():
    tokenizer = make_tokenizer()
    longest = max((scene.caption for scene in scenes(50)), key=len)
    tokens = tokenizer(longest, padding="max_length").input_ids
    assert len(tokens) == 16 and tokens.count(tokenizer.eos_token_id) == 16 - len(longest.split()) - 1
    assert tokenizer.decode(tokens, skip_special_tokens=True) == longest


def test_the_last_timestep_is_noise_and_the_weights_are_bounded():
    scheduler = make_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999


def arguments(monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["train_text_to_image.py", *SMALL, *map(str, more)])
    return training.parse_arguments()


@pytest.mark.parametrize("kind", [training.Denoising, training.Controlling])
def test_training_goes_on_as_if_it_had_not_stopped(kind, tmp_path, monkeypatch):
    def trained(output, steps):
        args = arguments(monkeypatch, "--output", output, "--max-steps", steps, "--batch-size", 1, "--scenes", 4)
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        parts = make_vae(8), training.make_text_encoder(tokenizer, 32), make_unet((32, 64), 32), args
        stage = kind(*parts, *([0.0] if kind is training.Denoising else []))
        training.train(stage, "stage", 1e9, args)
        return torch.load(output / "stage.pt")

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    start, whole = trained(tmp_path / "parts", 1), trained(tmp_path / "whole", 2)
    parts = trained(tmp_path / "parts", 2)
    assert start["step"] == 1 and parts["step"] == whole["step"] == 2
    for part in ("weights", "average"):
        assert parts[part].keys() == whole[part].keys()
        assert all(torch.equal(parts[part][name], weight) for name, weight in whole[part].items())
        assert any(not torch.equal(start[part][name], weight) for name, weight in whole[part].items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the script exports after two steps of each stage."""
    run = tmp_path_factory.mktemp("text-to-image")
    with pytest.MonkeyPatch.context() as patch:
        for more in (["--max-steps", "2", "--look-minutes", "0"], ["--export", str(run / "shapes")]):
            patch.setattr(sys, "argv", ["train_text_to_image.py", "--output", str(run / "run"), *SMALL, *more])
            training.main()
    return run / "shapes"


def test_the_folder_is_diffusers_own(folder):
    caption = scenes(1)[0].caption
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    run = torch.load(folder.parent / "run" / "unet.pt")["average"]
    for name, weight in pipe.unet.state_dict().items():
        torch.testing.assert_close(weight, run[f"unet.{name}"], rtol=1e-3, atol=1e-5)
    inputs = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    plain = pipe(caption, generator=torch.Generator().manual_seed(0), **inputs).images
    assert plain.shape == (1, 3, 128, 128) and plain.isfinite().all()

    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=controlnet)
    control = training.control_picture(draw(scenes(1)[0])[1][None])
    controlled = pipe(caption, image=control, generator=torch.Generator().manual_seed(0), **inputs).images
    assert controlled.shape == plain.shape and not torch.equal(controlled, plain)

    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert weights < 2.1 * sum(p.numel() for m in pipe.components.values() for p in getattr(m, "parameters", list)())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["training"]["unet"]["steps"] == 2 and "edges" in metrics["control"]
    assert (folder.parent / "run" / "samples.png").exists() and "2 steps" in (folder / "README.md").read_text()


def test_the_benchmark_compares_with_the_plain_pictures(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    from benchmarks import harness
    from benchmarks.diffusion import diffusion_quality as benchmark

    monkeypatch.setattr(benchmark, "save", lambda *args: harness.save(*args, folder=tmp_path))
    methods = ["tomesd 0.5, max_downsample 2, all", "ToDo 2", "blocks 0.5", "blocks 0.25", "attention 0.5"]
    options = ["--prompts", "1", "--seeds", "2", "--steps", "2", "--repeats", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["diffusion_quality", str(folder), *options, "--methods", *methods])
    benchmark.main()

    for task in ("text", "control"):
        rows = json.loads((tmp_path / f"cpu/diffusion_quality_{task}-fp32.json").read_text())["rows"]
        of_task = {row["method"]: row for row in rows}
        assert list(of_task) == ["plain", *methods]
        plain = of_task.pop("plain")
        assert plain["psnr"] is plain["psnr_of_all"] is None and plain["fewer_flops"] == plain["speed_up"] == 1
        for row in of_task.values():
            assert (
                5 < row["psnr_of_all"] <= row["psnr"] < 100
                and row["ssim"] < 1
                and row["fewer_flops"] > 1
                and row["ms"] > 0
            )
            assert 0 <= row["facts"] <= 1 and (row["edges"] is not None) == (task == "control")
        assert of_task["blocks 0.25"]["gflops"] < of_task["blocks 0.5"]["gflops"] < of_task["attention 0.5"]["gflops"]
        assert of_task["blocks 0.25"]["psnr"] < of_task["blocks 0.5"]["psnr"]
        assert (tmp_path / f"shapes-{task}-reduced.png").exists()
    assert "ours, of no more FLOPs" in capsys.readouterr().out


def test_ours_is_held_against_tomesd_at_no_more_cost():
    pytest.importorskip("skimage")
    from benchmarks.diffusion.diffusion_quality import against_tomesd

    def row(name, psnr, gflops):
        return {"method": name, "psnr": psnr, "psnr_of_all": psnr, "gflops": gflops, "fewer_flops": 9 / gflops}

    tomesd = [f"tomesd {ratio}, max_downsample 1" for ratio in (0.25, 0.5, 0.75)]
    ours = [f"blocks {keep}" for keep in (0.5, 0.35, 0.25)]
    rows = [row("plain", None, 9), row(tomesd[0], 20.0, 5), row(tomesd[1], 30.0, 2), row(tomesd[2], 30.0, 3)]
    rows += [row(name, psnr, gflops) for name, psnr, gflops in zip(ours, (22.0, 21.0, 27.0), (5, 4, 3), strict=True)]
    speeds = {tomesd[0]: 1.2, tomesd[1]: 1.1, ours[0]: 1.1, ours[1]: 1.2}
    first, second, untimed = against_tomesd(rows, speeds)
    assert (first["by_flops"], first["by_flops_psnr"]) == (ours[2], 7.0)
    assert (first["full_size"], first["by_speed"], first["by_speed_psnr"]) == (1.2, ours[1], 1.0)
    assert second["by_flops"] is None and second["by_flops_psnr"] is None
    assert (second["by_speed"], second["by_speed_psnr"]) == (ours[0], -8.0)
    assert untimed["by_flops"] == ours[2]
    assert untimed["full_size"] is untimed["by_speed"] is untimed["by_speed_psnr"] is None
