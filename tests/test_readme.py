"""The README: it is short, stands alone on a package index, and claims what the result files say."""

import json
import re
from pathlib import Path

from ailurus_hf.presets import DIFFUSION_PRESETS, VISION_PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REPOSITORY = "https://github.com/ailurus-hf/ailurus-hf"


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_its_links_and_pictures_are_absolute_and_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets and all(target.startswith("https://") for target in targets)
    ours = [re.fullmatch(rf"{REPOSITORY}/(?:blob|raw|tree)/main/(.+)", target) for target in targets]
    files = [match[1] for match in ours if match]
    assert len(files) > 10
    for file in files:
        assert (ROOT / file).exists(), file
    assert [t for t, match in zip(targets, ours) if not match] == ["https://arxiv.org/abs/2311.01197"]


def test_its_claim_is_measured() -> None:
    result = json.loads((ROOT / "benchmarks/results/cpu/ward_levels_camvid-fp32.json").read_text())
    plain, *rows = result["rows"]
    after_1 = {row["keep_ratio"]: row for row in rows if row["location"] == 1}
    whole, fast = after_1[0.45], after_1[0.3]
    claim = README.partition("**")[2].partition("**")[0].replace("\n", " ")
    assert f"{whole['speed_up']:.1f} times as fast on 45 % of its tokens and loses nothing" in claim
    assert f"{plain['miou']:.1f} mIoU" in claim and "as on all tokens" in claim
    assert whole["lost_is"] != "a loss" and f"{whole['miou']:.1f} mIoU" in claim and str(result["images"]) in claim
    assert f"{whole['ms']:.0f} ms instead of {plain['ms']:.0f} ms" in claim and result["device"].startswith("AMD EPYC")
    assert f"On 30 % it is {fast['speed_up']:.1f} times as fast and loses {fast['lost']:.1f}" in claim


def test_it_says_what_a_wider_model_loses() -> None:
    wider = json.loads((ROOT / "benchmarks/results/cpu/segmenter_quality_s_like-fp32.json").read_text())["rows"]
    lost = {row["keep_ratio"]: row["lost"] for row in wider if row["method"] == "Ward, smooth"}
    assert lost[0.45] < 0.1 and f"{lost[0.12]:.1f} mIoU on 12 %" in README
    assert "A weak model is forgiving" in README


def test_its_table_has_every_preset_in_at_most_eight_rows() -> None:
    table = re.search(r"<!-- table: presets -->(.*?)<!-- end -->", README, re.DOTALL)
    assert table
    rows = re.findall(r"^\| `\"(\w+)\"`", table[1], re.MULTILINE)
    assert set(rows) == {*VISION_PRESETS, *DIFFUSION_PRESETS} and len(rows) <= 8
