"""The paper's own tables: the commands of `make tables` on small checkpoints and data sets in the official layout."""

import json
from dataclasses import replace

import numpy as np
import original_segmenter as original
import pytest
from PIL import Image

from ailurus_hf.segmenter.convert import convert_segmenter_checkpoint
from benchmarks import harness, methods, tables
from benchmarks.harness import datasets
from benchmarks.vision import segmenter_quality, similarity

SIDE = 64  # larger than the checkpoint's windows of 48 pixels


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def write_data(folder, name, rng):
    """Two photographs and their label maps where each data set has them, in the values that its files hold."""
    for number in (1, 2):
        photograph = rng.integers(0, 255, (SIDE, SIDE + 16, 3))
        classes = np.kron(rng.integers(0, datasets.DATASETS[name].num_classes, (4, 5)), np.ones((16, 16))).astype(int)
        if name == "ade20k":
            stem = f"ADE_val_0000000{number}"
            write(folder / f"images/validation/{stem}.jpg", photograph)
            write(folder / f"annotations/validation/{stem}.png", classes + 1)
        elif name == "cityscapes":
            stem = f"frankfurt/frankfurt_000000_00000{number}"
            write(folder / f"leftImg8bit/val/{stem}_leftImg8bit.png", photograph)
            write(folder / f"gtFine/val/{stem}_gtFine_labelIds.png", np.array(datasets.CITYSCAPES_IDS)[classes])
        else:
            stem = f"2008_00000{number}"
            write(folder / f"JPEGImages/{stem}.jpg", photograph)
            write(folder / f"SegmentationClassContext/{stem}.png", classes)
            (folder / "ImageSets/SegmentationContext").mkdir(parents=True, exist_ok=True)
            with (folder / "ImageSets/SegmentationContext/val.txt").open("a") as listed:
                listed.write(f"{stem}\n")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """data/ and weights/ with what the entries of a data set need."""

    def make(data, model):
        monkeypatch.setattr(original, "CLASSES", datasets.DATASETS[data].num_classes)
        variant = original.make_variant()
        (tmp_path / "official").mkdir()
        checkpoint = original.save_checkpoint(tmp_path / "official", original.make_weights(variant), variant)
        convert_segmenter_checkpoint(checkpoint, tmp_path / "weights" / model)
        write_data(tmp_path / "data" / data, data, np.random.default_rng(0))
        return {"data": str(tmp_path / "data"), "weights": str(tmp_path / "weights")}

    return make


def words(entry, folders, few):
    """The entry's arguments on a CPU, with few methods, one location that three layers have, and two ratios."""
    few = {"methods": few, "locations": ["1"], "keep": ["0.5", "0.25"], "device": ["cpu"]}
    return replace(entry, options={**entry.options, **few}).words(folders)[2:]


def named(name):
    """The entry whose result file has that name, and its checkpoint."""
    (entry,) = [e for e in tables.ENTRIES if e.options.get("name") == [name]]
    return entry, entry.options["model"][0].removeprefix("{weights}/")


def run(module, entry, folders, few, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [entry.module, *words(entry, folders, few), "--repeats", "1"])
    monkeypatch.setattr(module, "save", lambda name, rows, about: harness.save(name, rows, about, tmp_path))
    module.main()
    name = entry.options["name"][0]
    return json.loads((tmp_path / f"cpu/{name}-fp32.json").read_text())


@pytest.mark.parametrize("data", ["ade20k", "cityscapes", "pascal_context"])
def test_table_1(data, folders, tmp_path, monkeypatch):
    entry, model = named(f"tab1_{data}")
    made = folders(data, model)
    assert entry.names == ("Tab. 1",)
    assert [need for need in entry.missing(made) if need != "gpu"] == []
    few = [methods.PAPER, "Expedite", "EViT:keep=0.5"]
    result = run(segmenter_quality, entry, made, few, tmp_path, monkeypatch)
    plain, *rows = result["rows"]
    assert (result["dataset"], result["images"], len(rows)) == (data, 2, 6)
    assert [row["num_clusters"] for row in rows if row["method"] == methods.PAPER] == [18, 9]  # of a window's 36
    for row in rows:
        assert row["gflops"] < plain["gflops"] and 0 <= row["miou"] <= 100 and 0 < row["agreement"] < 1
        (low, high), (least, most) = row["score_between"], row["lost_between"]
        assert low <= row["miou"] + 0.01 and row["miou"] <= high + 0.01 and least <= row["lost"] + 0.01 <= most + 0.02
    # The labels are read as the classes that they mean: predictions made into labels are right everywhere.
    found = datasets.SegmentationData(data, f"{made['data']}/{data}")
    assert set(found.label(0).unique().tolist()) <= {*range(found.num_classes)}


def test_tables_11_to_14(folders, tmp_path, monkeypatch):
    entry, model = named("tab11_ade20k")
    made = folders("ade20k", model)
    assert entry.title == "Tab. 11, 12, 13, 14"
    assert [need for need in entry.missing(made) if need != "gpu"] == []
    result = run(similarity, entry, made, [methods.PAPER, "CTM"], tmp_path, monkeypatch)
    assert result["images"] == 2 and len(result["rows"]) == 4 and len(result["pairs"]) == 1
    assert all(len(row["layers"]) == 4 and row["ms"]["total"] > row["ms"]["cluster"] > 0 for row in result["rows"])
