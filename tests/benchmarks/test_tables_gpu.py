"""`make tables-gpu` without a GPU: every row goes its way on tiny geometries; a row that fails is named, no more."""

import json

import gpu_rows
import pytest
import torch

from benchmarks import tables_gpu
from benchmarks.gpu import checks, worker
from benchmarks.gpu.rows import ROWS, Target


def summary(folder):
    return {line["row"]: line for line in json.loads((folder / "cpu" / "tables_gpu-all.json").read_text())["rows"]}


def test_every_row_runs_on_tiny_geometries(tmp_path, capfd):
    code = tables_gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)])
    out, err = capfd.readouterr()
    assert code == 0, err
    lines = summary(tmp_path)
    assert list(lines) == list(ROWS)
    for key, line in lines.items():
        if ROWS[key].cuda:
            assert (line["state"], line["why"]) == ("left out", "only CUDA has this")
            continue
        assert line["state"] == "done", line
        stored = json.loads((tmp_path / "cpu" / f"{key}.json").read_text())
        assert stored["versions"]["torch"] == torch.__version__ and stored["rows"]
        assert len(line["targets"]) >= len(ROWS[key].targets), "a target that is about no row"
        if key.startswith("gpu_checks"):
            assert all(row["holds"] or row["note"] == "only CUDA has this" for row in stored["rows"])
            assert sum(row["holds"] is True for row in stored["rows"]) >= 5
    assert "A dry run" in out and "targets hold." in out and "failed" not in out


def test_what_fails_is_named_and_the_rest_is_made(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(worker, "LEAST_SECONDS", 3)
    arguments = ["--device", "cpu", "--output", str(tmp_path), "--minutes", "20"]

    def run(*more):
        assert tables_gpu.main([*arguments, *more], gpu_rows.ROWS, "gpu_rows") == 1
        return capfd.readouterr().out, {row.partition("-")[0]: line for row, line in summary(tmp_path).items()}

    out, lines = run()
    said = {name: (line["state"], line["why"].partition(" (")[0]) for name, line in lines.items()}
    assert said.pop("too_long")[0] == "no time"
    assert said == {
        "works": ("done", ""),
        "raises": ("failed", "ValueError: as it said"),
        "lacks": ("left out", "ModuleNotFoundError: No module named 'no_such_library'"),
        "lacks_our_own": ("failed", "ModuleNotFoundError: No module named 'ailurus_hf.no_such_module'"),
        "dies": ("failed", "its process ended with exit code 7"),
        "hangs": ("failed", "took longer than 3 seconds"),
        "does_not_hold": ("failed", "b: differs"),
        "only_cuda": ("left out", "only CUDA has this"),
        "works_too": ("done", ""),
    }
    assert "1 of 2 targets hold." in out and "2 of 10 rows made." in out
    assert "| works-fp32 | one | value | ≥ 2 | 1.000 | NO |" in out
    for name in said:
        assert f"{name} it does" in out
    written = {path.name for path in (tmp_path / "cpu").iterdir()}
    assert written == {f"{name}-fp32.json" for name in ("works", "does_not_hold", "works_too")} | {
        "tables_gpu-all.json"
    }

    first = (tmp_path / "cpu" / "works-fp32.json").stat().st_mtime_ns
    out, again = run("--resume", "--only", "works-fp32", "raises-fp32")
    assert "-- works it does, fp32: done before" in out and "== raises it does" in out
    assert (tmp_path / "cpu" / "works-fp32.json").stat().st_mtime_ns == first
    assert again["works"] == lines["works"] and again["works_too"] == lines["works_too"]


def test_a_device_that_is_not_there(capfd, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tables_gpu.main(["--output", str(tmp_path)], gpu_rows.ROWS, "gpu_rows") == 2
    assert "no row can be made on cuda" in capfd.readouterr().out and not list(tmp_path.iterdir())


def test_the_list_and_unknown_rows(capsys):
    assert tables_gpu.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{key}: " in out for key in ROWS)
    with pytest.raises(SystemExit) as ended:
        tables_gpu.main(["--only", "gpu_nothing"])
    assert ended.value.code == 2
    assert sum(row.minutes for row in ROWS.values()) < 60, "more than two runs"


def test_targets_read_the_rows_that_they_are_about():
    rows = [{"method": "a", "ms": 3.0}, {"method": "b", "ms": 5.0}, {"method": "b", "ms": None}]
    (line,) = Target("ms", {"method": "b"}, most=4).reached(rows)
    assert (line["of"], line["value"], line["holds"], line["wanted"]) == ("b", 5.0, False, "≤ 4")
    assert [line["holds"] for line in Target("ms", least=4).reached(rows)] == [False, True]


def test_checks_tell_what_does_not_hold(monkeypatch):
    cpu, real = torch.device("cpu"), checks.get_clustering

    def shifted(name):
        """As on a device that gets it wrong: every second call has one cluster for all."""
        calls = []

        def cluster(features, grid, count):
            calls.append(1)
            return real(name)(features * (len(calls) % 2), grid, count)

        return cluster

    monkeypatch.setattr(checks, "get_clustering", shifted)
    rows = checks.measure_clustering(cpu, tiny=True)
    assert {row["check"].split()[0] for row in rows if row["holds"] is False} >= {
        "local_kmeans",
        "ward",
        "density_peaks",
    }
    monkeypatch.setattr(checks, "count_weighted_attention", lambda q, k, v, counts, form: q)
    wrong = [row["check"] for row in checks.measure_clustering(cpu, tiny=True) if row["holds"] is False]
    assert sum("form weighs" in check for check in wrong) == 6
