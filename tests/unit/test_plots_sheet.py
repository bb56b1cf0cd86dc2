"""The sheet of runs: which lines it shows, what thinning keeps, and which picture is drawn of which record."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from megatron_muon.commands import plot
from megatron_muon.monitor import metrics, page, plots, sheet
from megatron_muon.monitor.sheet import Panel, Point
from tests.unit.sick_run import CLASSES, write_record


def panels(path: Path, with_classes: bool = False) -> dict[str, Panel]:
    return {panel.key: panel for panel in sheet.panels({"run": metrics.read(path)}, with_classes)}


def test_thinning_keeps_spikes_what_is_not_finite_and_the_end() -> None:
    points = [Point(i, 1.0 + i % 7) for i in range(100_000)]
    points[50_001], points[70_003], points[80_000] = Point(50_001, 99.0), Point(70_003, -5.0), Point(80_000, None)
    points[60_000] = Point(60_000, 3.0, low=2.0, high=500.0)
    kept = sheet.thin(points, 400)
    assert len(kept) <= 402
    assert {points[i] for i in (50_001, 60_000, 70_003, 80_000, 99_999)} <= set(kept)
    assert list(kept) == sorted(kept, key=lambda point: point.iteration)
    assert sheet.thin(points[:400], 400) == points[:400]


def test_a_sick_run_shows_its_worst_class_beside_the_middle_and_the_alarms_where_they_belong(tmp_path: Path) -> None:
    found = panels(write_record(tmp_path / "metrics.jsonl", is_sick=True))
    middle, worst = found["defect"].lines
    assert worst.name == "self_attention.linear_qkv[v] (worst)"
    assert worst.points[-1].value is None  # it has ended in NaN, which is worse than any number
    assert max(point.value or 0.0 for point in middle.points) < 0.25 < worst.points[-5].value
    assert middle.points[10].low == pytest.approx(min_of(tmp_path / "metrics.jsonl", 10, "defect"))
    assert found["defect"].alarms == ["defect"] and found["defect"].limits == [0.5]
    assert found["shares"].alarms == ["dead_experts"] and found["shares"].limits == []
    assert found["stable_rank"].lines[1].points[-5].value < 3 < found["stable_rank"].lines[0].points[-5].low + 3
    assert not any(panel.alarms for panel in panels(write_record(tmp_path / "healthy.jsonl")).values())


def min_of(path: Path, number: int, stat: str) -> float:
    classes = metrics.read(path).muon[number]["classes"]
    return min(numbers[stat][0] for numbers in classes.values())


def test_the_parts_of_the_step_stand_upon_one_another(tmp_path: Path) -> None:
    parts = [line for line in panels(write_record(tmp_path / "m.jsonl"))["parts"].lines if line.role == "part"]
    assert [line.name for line in parts] == ["pack", "exchange", "products", "waiting", "write"]
    for below, above in itertools.pairwise(parts):
        assert [point.value for point in below.points] == [point.low for point in above.points]
    assert parts[-1].points[0].value == pytest.approx(0.009 * 5 + 0.001 * 10)


def test_without_muon_lines_only_what_every_run_has_is_shown(tmp_path: Path) -> None:
    found = panels(write_record(tmp_path / "metrics.jsonl", interval=0), with_classes=True)
    assert list(found) == ["loss", "rate", "grad_norm", "logit", "time"]


def test_which_picture_is_drawn_is_told_by_the_record_or_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(Path("run/metrics.jsonl"), is_sick=True)
    plain = write_record(Path("plain.jsonl"), interval=0)

    def written(*arguments: str) -> list[str]:
        plot.main(list(arguments))
        return [line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines()]

    assert written("run") == ["sheet.png"]
    assert 20_000 < Path("sheet.png").stat().st_size < 200_000
    assert written(str(plain)) == ["losses.png"]
    assert written("run", "--html", "page.html") == ["page.html"]
    assert written(str(plain), "--kind", "sheet", "--html", "page.html", "--out", "x.svg") == ["page.html", "x.svg"]


def test_runs_that_have_just_begun_and_those_that_are_being_written(tmp_path: Path) -> None:
    path = write_record(tmp_path / "run.jsonl", is_sick=True)
    text = path.read_text()
    begun = tmp_path / "begun.jsonl"
    begun.write_text(text.partition("\n")[0] + "\n")
    path.write_text(text[: int(0.8 * len(text))])
    runs = {file.stem: metrics.read(file) for file in (begun, path)}
    page.write_page(runs, tmp_path / "page.html")
    assert "begun: 0 of 200 iterations" in (tmp_path / "page.html").read_text()
    page.write_page({"begun": runs["begun"]}, tmp_path / "page.html")
    plots.plot_sheet({"begun": runs["begun"]}, tmp_path / "sheet.png")


def test_a_run_without_a_finite_number_has_a_sheet_and_a_name_may_have_dollars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a$\\b$").mkdir()
    monkeypatch.chdir(tmp_path / "a$\\b$")
    lines = [{"kind": "start", "iteration": 0, "train_iters": 2}]
    for iteration in (1, 2):
        train = {"losses": {"lm loss": None}, "learning_rate": 0.1, "grad_norm": None, "seconds": 1.0}
        lines.append({"kind": "train", "iteration": iteration, **train, "optimizer_seconds": 0.1})
        numbers = {"matrices": 1, "spectral_norm": [None] * 3, "defect": [None] * 3}
        lines.append({"kind": "muon", "iteration": iteration, "classes": {"x": numbers}})
    Path(plots.METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(plots.find_runs([Path(plots.METRICS_FILE)])) == ["a$\\b$"]
    plot.main([plots.METRICS_FILE, "--out", "sheet.png"])
    with pytest.raises(SystemExit, match="2"):
        plot.main([plots.METRICS_FILE, "--out", "sheet.xyz"])
    assert "sheet.xyz: Format 'xyz' is not supported" in capsys.readouterr().err


def test_hundreds_of_classes_make_a_page_of_some_megabytes(tmp_path: Path) -> None:
    classes = tuple(name.replace("*", str(layer)) for layer in range(60) for name in CLASSES[:5])
    run = metrics.read(write_record(tmp_path / "run.jsonl", 20, 2, classes=classes))
    page.write_page({"run": run}, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 8_000_000


def test_text_of_records_cannot_leave_its_place(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = metrics.read(write_record(tmp_path / "run.jsonl", classes=(evil,), flags={evil: evil}))
    run.alarms.append({"kind": "alarm", "iteration": 3, "alarm": evil, "weights": [evil], "text": evil})
    page.write_page({evil: run}, tmp_path / "page.html", title=evil)
    text = (tmp_path / "page.html").read_text()
    assert text.count("</script>") == 2 and "<img" not in text
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["names"] == [evil]
