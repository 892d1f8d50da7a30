"""The text-to-image example: scenes and the rules that read them, training that goes on where it was, and the folder.

Its benchmark runs on that folder, here of a model that has learned nothing.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file
from transformers import CLIPTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_text_to_image as training  # noqa: E402
from shape_models import make_scheduler, make_sd3, make_tokenizer, make_unet, make_vae, pipeline_options  # noqa: E402
from shape_scenes import COLORS, SHAPES, WORDS, draw, edge_adherence, edges, random_scene, read  # noqa: E402

SMALL = ["--widths", "32", "64", "--text-width", "32", "--vae-width", "8", "--batch-size", "2", "--look-at", "1"]
SMALL += ["--width", "32", "--layers", "2"]


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


def test_a_word_has_the_same_number_wherever_the_tokenizer_is_made():
    first, *others = (make_tokenizer().get_vocab() for _ in range(8))
    assert all(other == first for other in others)


def test_the_last_timestep_is_noise_and_the_weights_are_bounded():
    scheduler = make_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999


def arguments(monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["train_text_to_image.py", *SMALL, *map(str, more)])
    return training.parse_arguments()


def make_stage(kind, args):
    torch.manual_seed(0)
    vae, is_sd3 = make_vae(8), kind is training.Flowing
    text_encoder = training.make_text_encoder(make_tokenizer(), 32, pooled=is_sd3)
    network = make_sd3(2, 32, 32) if is_sd3 else make_unet((32, 64), 32)
    return kind(vae, text_encoder, network, args, *([0.0] if kind is training.Denoising else []))


@pytest.mark.parametrize("kind", [training.Denoising, training.Controlling, training.Flowing])
def test_training_goes_on_as_if_it_had_not_stopped(kind, tmp_path, monkeypatch):
    def trained(output, steps):
        args = arguments(monkeypatch, "--output", output, "--max-steps", steps, "--batch-size", 1, "--scenes", 4)
        training.train(make_stage(kind, args), "stage", 1e9, args)
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


def test_a_flow_goes_straight_from_noise_to_latents(monkeypatch, tmp_path):
    stage = make_stage(training.Flowing, arguments(monkeypatch, "--output", tmp_path))
    latents = torch.randn(64, 4, 8, 8)
    noisy, timesteps, target, weight = stage.noised(latents, np.random.default_rng(0))
    along = (timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(noisy - along * target, latents)
    noise = noisy + (1 - along) * target
    assert abs(noise.std() - 1) < 0.05 and (weight == 1).all()
    # Logit-normal: half of them below the middle, and two thirds between 1 / (1 + e) and its mirror.
    assert (timesteps < 500).float().mean() == 0.5 and abs(((timesteps - 500).abs() < 231).float().mean() - 0.68) < 0.05


def test_a_flow_is_trained_on_what_its_pipeline_gives(monkeypatch, tmp_path):
    stage = make_stage(training.Flowing, arguments(monkeypatch, "--output", tmp_path))
    pipe, captions, given = stage.pipeline(), [scene.caption for scene in scenes(2)], []
    stage.transformer.register_forward_pre_hook(lambda m, args, kwargs: given.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        stage.predict(torch.randn(2, 4, 32, 32), torch.tensor([1.0, 2.0]), captions, torch.zeros(2))
        prompt, _, pooled, _ = pipe.encode_prompt(
            captions, captions, captions, do_classifier_free_guidance=False, **pipeline_options(pipe)
        )
    torch.testing.assert_close(given[0]["encoder_hidden_states"], prompt)
    torch.testing.assert_close(given[0]["pooled_projections"], pooled)


def exported(run, *more):
    """What the script exports after two steps of each stage."""
    with pytest.MonkeyPatch.context() as patch:
        for last in (["--max-steps", "2", "--look-minutes", "0"], ["--export", str(run / "shapes")]):
            patch.setattr(sys, "argv", ["train_text_to_image.py", "--output", str(run / "run"), *SMALL, *more, *last])
            training.main()
    return run / "shapes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("text-to-image"))


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("text-to-image-sd3"), "--network", "sd3")


def test_the_folder_shaped_as_sd3_is_diffusers_own(sd3_folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder, text_encoder_3=None, tokenizer_3=None)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float32}
    run = torch.load(sd3_folder.parent / "run" / "sd3.pt")["average"]
    for name, weight in pipe.transformer.state_dict().items():
        if f"transformer.{name}" in run:
            torch.testing.assert_close(weight, run[f"transformer.{name}"], rtol=1e-3, atol=1e-5)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", **pipeline_options(pipe)}
    made = pipe(scenes(1)[0].caption, generator=torch.Generator().manual_seed(0), **options).images
    assert made.shape == (1, 3, 128, 128) and made.isfinite().all()
    metrics = json.loads((sd3_folder / "metrics.json").read_text())
    assert metrics["training"]["sd3"]["steps"] == 2 and "control" not in metrics
    card = (sd3_folder / "README.md").read_text()
    assert "2 steps" in card and "max_sequence_length=0" in card and "ControlNet" not in card


@pytest.mark.parametrize("more", [[], ["--network", "sd3"]], ids=["unet", "sd3"])
def test_a_run_begins_with_what_another_exported(more, tmp_path, request):
    before = request.getfixturevalue("sd3_folder" if more else "folder")
    vocabulary = before / "tokenizer" / "tokenizer.json"
    kept = vocabulary.read_text()
    try:
        # Of an older script, in which two words had each other's numbers.
        swap = {'"red</w>"': '"blue</w>"', '"blue</w>"': '"red</w>"'}
        vocabulary.write_text(re.sub("|".join(swap), lambda found: swap[found[0]], kept))
        swapped = make_tokenizer().convert_tokens_to_ids("blue</w>")
        after = exported(tmp_path, "--begin-with", str(before), *more)
    finally:
        vocabulary.write_text(kept)
    assert CLIPTokenizer.from_pretrained(after / "tokenizer").convert_tokens_to_ids("red</w>") == swapped
    of, began = (json.loads((folder / "metrics.json").read_text())["training"] for folder in (after, before))
    name = "sd3" if more else "unet"
    assert of["vae"] == began["vae"] and of[name]["steps"] == 4 == 2 * began[name]["steps"]
    # Another is made from the new UNet.
    assert more or of["controlnet"]["steps"] == 2 == began["controlnet"]["steps"]
    weights = [load_file(next((folder / "vae").glob("*.safetensors"))) for folder in (after, before)]
    assert all(torch.equal(weights[0][key], weight) for key, weight in weights[1].items())


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
    methods += ["DeepCache 2"]
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
            # Of one prompt: nothing is known of others.
            assert row["psnr_between"] == pytest.approx([row["psnr"]] * 2) and row["facts_are"]
        assert of_task["blocks 0.25"]["gflops"] < of_task["blocks 0.5"]["gflops"] < of_task["attention 0.5"]["gflops"]
        assert of_task["blocks 0.25"]["psnr"] < of_task["blocks 0.5"]["psnr"]
        assert (tmp_path / f"shapes-{task}-reduced.png").exists()
    assert "ours, of no more FLOPs" in capsys.readouterr().out


def test_the_benchmark_takes_the_folder_shaped_as_sd3(sd3_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    from benchmarks import harness
    from benchmarks.diffusion import diffusion_quality as benchmark

    monkeypatch.setattr(benchmark, "save", lambda *args: harness.save(*args, folder=tmp_path))
    methods = ["ToMA 0.5, all", "ClusCa 2", "random representatives 0.5", "blocks 0.25 after layer 1"]
    options = ["--prompts", "2", "--seeds", "1", "--steps", "4", "--repeats", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["diffusion_quality", str(sd3_folder), *options, "--methods", *methods])
    benchmark.main()
    rows = json.loads((tmp_path / "cpu/diffusion_quality_sd3_text-fp32.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["plain", *methods]
    assert all(row["fewer_flops"] > 1 and row["psnr"] > 5 for row in rows[1:])
    low, high = rows[1]["psnr_between"]
    assert low <= rows[1]["psnr"] <= high
    printed = capsys.readouterr().out
    assert "| ClusCa 2 |" in printed.partition("ours, of no more FLOPs")[2]


def test_scores_are_compared_on_the_same_prompts():
    pytest.importorskip("skimage")
    from benchmarks.diffusion.diffusion_quality import intervals

    # Of each prompt: pictures, PSNR and SSIM in all, facts shown and facts asked for.
    plain = np.array([[2, 0, 0, shown, 8] for shown in range(8)], dtype=float)
    fewer = np.subtract(plain, [0, 0, 0, 1, 0])
    found = intervals({"plain": plain, "one": np.add(plain, [0, 60, 1, 0, 0]), "fewer": np.clip(fewer, 0, None)})
    assert found["one"]["psnr_between"] == [30, 30] and found["one"]["ssim_between"] == [0.5, 0.5]
    low, high = found["one"]["facts_between"]
    assert 0.15 < low < plain[:, 3].sum() / 64 < high < 0.75
    # The scores differ less than either is known to, and yet surely, as all but one prompt lose one.
    assert found["one"]["facts_more_between"] == [0, 0] and found["one"]["facts_are"] == "may be chance"
    assert found["fewer"]["facts_are"] == "fewer" and found["fewer"]["facts_between"][1] > low


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


def test_a_run_without_a_controlnet_exports_none(tmp_path):
    folder = exported(tmp_path, "--controlnet-minutes", "0")
    assert not (folder / "controlnet").exists() and (folder / "unet").exists()
    assert "control" not in json.loads((folder / "metrics.json").read_text())
    assert "ControlNet" not in (folder / "README.md").read_text()
