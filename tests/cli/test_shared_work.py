"""Several processes share a command's images: their results are as of one process, and a dead one is named."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import ROOT, Ranks

from ailurus_hf.cli import main, shared_work
from ailurus_hf.cli.launchers import LaunchError, Place, launched
from ailurus_hf.cli.shared_work import Meeting, ProcessError, device_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images, of which one is none, and one is cut off."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for seed in range(12):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{seed:02d}.png")
    Path("images/05.png").write_text("no image")
    cut = Path("images/08.png")
    cut.write_bytes(cut.read_bytes()[:900])


def command(models: Path, kind: str, output: str, *options: str) -> list[str]:
    model = {"segment": "segmenter", "visualize": "vit", "classify": "vit"}[kind]
    return [kind, "images", "--model", str(models / model), "--device", "cpu", "--output", output, *options]


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(("kind", "size"), [("segment", 2), ("segment", 5), ("visualize", 2), ("classify", 2)])
def test_what_is_written_and_said_is_as_of_one_process(
    kind: str, size: int, models: Path, ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("one").mkdir()
    Path("more").mkdir()
    ends = ("one/x", "more/x") if kind == "classify" else ("one", "more")
    assert main(command(models, kind, ends[0], "--json-lines")) == 1
    streams = capfd.readouterr()
    first, *others = ranks(*command(models, kind, ends[1], "--json-lines"), size=size)
    assert first.code == 1 and first.out == streams.out.replace("one/", "more/")
    told = [Path(json.loads(line)["image"]).stem for line in first.out.splitlines()]
    assert told == ["05", *(f"{number:02d}" for number in range(12) if number != 5)]
    assert first.err.splitlines()[:2] == streams.err.splitlines()[:2], first.err
    assert first.err.endswith("10 done, 2 failed\n")
    assert others == [(0, "", "")] * (size - 1)
    assert contents("more") == contents("one")


def test_json_is_one_document_with_the_times_of_all(models: Path, ranks: Ranks) -> None:
    first, _ = ranks(*command(models, "segment", "out", "--json", "--batch-size", "2"))
    found = json.loads(first.out)
    assert [each["image"] for each in found["images"]] == [f"images/{i:02d}.png" for i in range(12) if i not in (5, 8)]
    assert [each["image"] for each in found["failed"]] == ["images/05.png", "images/08.png"]
    assert found["took"]["ms"] > 0 and found["took"]["tokens"] == [20, 10]


def test_a_dead_process_is_named_and_resume_does_the_rest(
    models: Path, ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(command(models, "segment", "one")) == 1
    first, second = ranks(*command(models, "segment", "more", "--json"), die={1: 2})
    assert (first.code, second.code) == (1, -9)
    assert "rank 1 of 2 (process " in first.err and "ended before its share was done: 2 of its 5 images" in first.err
    assert len([each for each in json.loads(first.out)["failed"] if "rank 1" in each["error"]]) == 2
    assert len(contents("more")) == 2 * (10 - 2)
    first, second = ranks(*command(models, "segment", "more", "--resume"), size=2)
    assert (first.code, second.code) == (1, 0) and "2 done, 8 skipped" in first.err
    assert contents("more") == contents("one")


def test_without_the_first_process_the_others_do_their_share(models: Path, ranks: Ranks) -> None:
    first, second = ranks(*command(models, "segment", "out"), die={0: 1})
    assert (first.code, second.code) == (-9, 1)
    assert second.err.startswith("ailurus-hf segment: error: rank 1 of 2: rank 0 of 2 (process ")
    assert main(command(models, "segment", "out", "--resume")) == 1 and main(command(models, "segment", "one")) == 1
    assert contents("out") == contents("one")


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 1), (1, 3)])
def test_scores_in_a_file_outlive_a_dead_process(
    rank: int, size: int, models: Path, ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(command(models, "classify", "one")) == 1
    ranks(*command(models, "classify", "more"), die={rank: 2})
    capfd.readouterr()
    if size == 1:
        assert main(command(models, "classify", "more", "--resume")) == 1
        told = capfd.readouterr().err
    else:
        told = ranks(*command(models, "classify", "more", "--resume"), size=size)[0].err
    assert ("4 done, 6 skipped" if rank == 0 else "2 done, 8 skipped") in told, told
    assert Path("more").read_bytes() == Path("one").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["images", "more", "one"]


def test_the_slurm_script_of_the_page(models: Path, ranks: Ranks) -> None:
    page = (ROOT / "docs/how-to/many-images.md").read_text()
    (line,) = re.findall(r"^srun ailurus-hf (.*)$", page, re.MULTILINE)
    argv = line.replace("photos/", "images").replace("my-segmenter", str(models / "segmenter")).split()
    steps = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_TASKS": "2"} for i in range(2)]
    first, second = ranks(*argv, environments=steps)
    assert (first.code, second) == (1, (0, "", "")) and first.err.endswith("10 done, 2 failed\n")
    assert len(contents("results-slurm")) == 20


def test_a_wrong_call_is_told_once(models: Path, ranks: Ranks) -> None:
    ranks(*command(models, "segment", "out"))
    first, second = ranks(*command(models, "segment", "out"))
    assert first.code == 2 and "is there already" in first.err and second == (0, "", "")
    first, _ = ranks("classify", "images", "--model", "x")
    assert first.code == 2 and "2 processes meet where results go: --output is needed" in first.err
    first, second = ranks(*command(models, "segment", "pairs", "--compare"))
    assert first.code == 2 and "--compare measures times" in first.err and second.err == ""


def test_strict_stops_all(models: Path, ranks: Ranks) -> None:
    Path("images/05.png").unlink()
    first, second = ranks(*command(models, "segment", "out", "--strict"))
    assert first.code == 1 and "images/08.png" in first.err
    assert second.code in (0, 1)
    assert "has ended the command" in second.err or not second.code


def test_compare_where_each_has_a_machine_of_its_own(
    models: Path, ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    first, _ = ranks(
        *command(models, "segment", "out", "--compare", "--repeats", "1", "--json"),
        environments=[{"RANK": str(i), "WORLD_SIZE": "2", "MADE_MACHINE": str(i)} for i in range(2)],
    )
    found = json.loads(first.out)
    assert len(found["images"]) == 10 and 0 <= found["all"]["agreement"] <= 1
    assert len(contents("out")) == 10


def test_other_images_are_refused(models: Path, ranks: Ranks) -> None:
    Path("other.png").write_bytes(Path("images/00.png").read_bytes())
    here = [{"RANK": str(i), "WORLD_SIZE": "2"} for i in range(2)]
    here[1]["MORE_ARGUMENTS"] = "--list list.txt"
    Path("list.txt").write_text("other.png")
    first, second = ranks(*command(models, "segment", "out"), environments=here)
    assert second.code == 2 and "rank 1 of 2: the 13 images found here are not those" in second.err
    assert first.code == 1 and "rank 1 of 2 (process " in first.err


def test_who_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_work, "PATIENCE", 0.1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/rank-1.json").write_text("of an earlier run")
    with pytest.raises(ProcessError, match="of 3 processes, rank 1, 2 did not come"):
        Meeting(tmp_path / "run", Place(0, 3), {})
    with pytest.raises(ProcessError, match="the first process did not come"):
        Meeting(tmp_path / "run", Place(1, 3), {})


def test_on_another_machine_silence_is_the_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(tmp_path / "run", Place(0, 1), {})
    meeting.members.append(meeting.me._replace(machine="another", pid=2**22 + 1))
    sign = tmp_path / "run/rank-1.json"
    sign.touch()
    assert not meeting.is_gone(1)  # the first look is where the time begins
    monkeypatch.setattr(shared_work, "SILENCE", 0.0)
    os.utime(sign, (1, 1))
    assert not meeting.is_gone(1)
    assert meeting.is_gone(1)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (0, 1)),  # the batch script itself
    ],
)
def test_places(variables: dict[str, str], place: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", variables)
    assert launched() == place


def test_a_place_that_cannot_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="RANK must be from 0 to WORLD_SIZE - 1, got 2 and 2"):
        launched()
    assert main(["segment", "images", "--model", "x"]) == 2 and "RANK must be" in capsys.readouterr().err


def test_each_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_for("auto", neighbor) for neighbor in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [device_for(name, 1) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_for("auto", 1) == "cpu"


def test_under_accelerate_a_killed_process_ends_it(models: Path) -> None:
    """Its launcher ends the other one, and says which it was; then the same line with --resume does the rest."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    program = Path("killed.py")
    program.write_text(
        "import os, sys\nfrom ailurus_hf.cli import main\nfrom ailurus_hf.evaluation import paired\n"
        "def die(*args):\n    while not os.path.exists('out/11_overlay.png'):\n        pass\n"
        "    os.kill(os.getpid(), 9)\n"
        "if os.environ['RANK'] == '1':\n    paired.timed = die\n"
        "sys.exit(main())\n"
    )
    ended = subprocess.run(
        [*launcher, str(program), *command(models, "segment", "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in ended.stderr and "rank 1 of 2 (process " in ended.stderr
    assert main(command(models, "segment", "out", "--resume")) == 1 and main(command(models, "segment", "one")) == 1
    assert contents("out") == contents("one")
