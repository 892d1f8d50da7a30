"""The list of tables and figures: complete, runnable where everything is there, and plain about what is not."""

import importlib.util
import json

import pytest

from ailurus_hf import AiluRusError
from benchmarks import harness, methods, tables
from benchmarks.harness import plots

TABLES = {f"Tab. {i}" for i in range(1, 16)} | {f"Fig. {i}" for i in (2, 3, 4, 5, 6, 7, 8, 9)}


def test_every_table_and_figure_is_in_the_list():
    assert {name for entry in tables.ENTRIES for name in entry.names} - {"speed", "settings", "beyond"} == TABLES


@pytest.mark.parametrize("entry", tables.ENTRIES, ids=lambda entry: f"{entry.title}: {entry.what}")
def test_commands_are_those_of_scripts_that_take_them(entry):
    words = entry.words({"data": "D", "weights": "W", "gpu": "G"})
    assert not any("{" in word for word in words)
    if entry.module is None:
        assert (tables.ROOT / words[0]).is_file()
    elif importlib.util.find_spec(entry.module) is None:
        pytest.skip(f"{entry.module} is not here yet")
    if entry.module != "ailurus_hf.cli":
        source = tables.ROOT / (entry.module.replace(".", "/") + ".py" if entry.module else words[0])
        known = source.read_text() + (tables.ROOT / "benchmarks/vision/quality.py").read_text()
        assert all(f'"--{name}"' in known for name in entry.options)
    for name in entry.options.get("methods", []):
        methods.parsed(name)


def test_a_list_stands_for_its_words_and_each_item_makes_an_entry(tmp_path):
    (tmp_path / "list.toml").write_text("""
[words]
here = "{data}/x"
[lists]
two = ["a", "{here}"]
[commands.shared]
run = "benchmarks.a"
options = { first = 1, methods = "none" }
needs = ["{here}"]
[[tables]]
for = ["Tab. {number}", "Tab. 9", "Fig. 2"]
what = "of {number}"
command = "shared"
minutes = 3
options = { methods = ["{two}", "b"], keep = "{shares}", flag = true, name = "n{number}" }
each = [{ number = 1, shares = [0.5, 1] }, { number = 2, shares = 1, minutes = 9, options = { last = "{weights}" } }]
""")
    one, two = tables.read_list(tmp_path / "list.toml")
    assert (one.title, one.what, one.minutes, one.needs) == ("Tab. 1, 9, Fig. 2", "of 1", 3, ("{data}/x",))
    folders = {"data": "D", "weights": "W Z"}
    words = [
        "-m",
        "benchmarks.a",
        "--first",
        "1",
        "--methods",
        "a",
        "D/x",
        "b",
        "--keep",
        "0.5",
        "1",
        "--flag",
        "--name",
        "n1",
    ]
    assert one.words(folders) == words and two.words(folders)[-2:] == ["--last", "W Z"]
    assert two.minutes == 9 and two.options["keep"] == ["1"]


def test_says_what_is_missing_and_runs_the_rest(tmp_path, monkeypatch, capsys):
    (tmp_path / "camvid").mkdir()
    monkeypatch.setenv("AILURUS_DATA", str(tmp_path))
    monkeypatch.delenv("AILURUS_WEIGHTS", raising=False)
    monkeypatch.setattr("sys.argv", ["tables", "--list", "--only", "Tab. 7", "Tab. 8"])
    assert tables.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("== Tab. 7") and f"--data {tmp_path}/camvid" in lines[1]
    assert lines[2].startswith("-- Tab. 7") and f"needs {tmp_path}/ade20k" in lines[2]
    assert lines[3].endswith(f"needs {tmp_path}/cifar10, AILURUS_WEIGHTS/classifier-cifar10")

    ran = tmp_path / "ran"
    monkeypatch.setattr("sys.argv", ["tables"])
    entries = [
        tables.Entry(("a",), "works", "made.py"),
        tables.Entry(("b",), "fails", "made.py", ("3",)),
        tables.Entry(("c",), "cannot", "made.py", needs=("{data}/ade20k",)),
    ]
    script = f'import sys; open({str(ran)!r}, "w"); raise SystemExit(int(sys.argv[1] if sys.argv[1:] else 0))'
    (tmp_path / "made.py").write_text(script)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "ENTRIES", entries)
    assert tables.main() == 1 and ran.exists()
    assert "failed: b: fails" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [*plots.KINDS])
def test_plots_from_a_result_file(kind, tmp_path):
    rows = [{"method": "plain", "miou": 60.0, "speed_up": 1.0, "images_per_second": 100.0, "ms": 10.0}]
    for method, keep, miou in (("a", 0.5, 59.0), ("a", 0.25, 57.0), ("b", 0.5, 58.0), ("b", 0.25, 50.0)):
        speed = {
            "miou": miou,
            "speed_up": 1 / keep,
            "images_per_second": 100 / keep,
            "ms": 10 * keep,
            "num_clusters": int(100 * keep),
        }
        rows.append({"method": method, "location": 2, "keep_ratio": keep, "sizes": {"1": 3, "2": 1}, **speed})
    about = {"device": "a CPU", "precision": "fp32", "versions": {"torch": "2"}}
    file = harness.save("x", rows if kind != "sizes" else rows[1:], about, tmp_path)
    assert plots.draw(kind, [file, file]).stat().st_size > 5000
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(file.read_text()), "images": 7}))
    with pytest.raises(AiluRusError, match=r"different images.*7"):
        plots.draw(kind, [file, other])


def test_the_front_holds_no_row_that_another_equals_and_surpasses():
    rows = [{"speed_up": s, "miou": q} for s, q in ((1, 60), (2, 58), (2, 57), (3, 50), (1.5, 57))]
    assert [(r["speed_up"], r["miou"]) for r in plots.best_at_each_speed(rows, "miou")] == [(3, 50), (2, 58), (1, 60)]
