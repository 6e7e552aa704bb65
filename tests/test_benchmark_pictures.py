"""Pictures of the committed results say what a reader needs: baseline, units, number of rounds, every run."""
import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.fits import of_growth
from benchmarks.pictures import PICTURES

pytest.importorskip("matplotlib")
RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
DOCUMENTS = {path.stem: json.loads(path.read_text()) for path in RESULTS}
ALL = [(name, suffix) for name, document in DOCUMENTS.items() for suffix in PICTURES[document["section"]]]


def drawn(name, suffix=""):
    document = DOCUMENTS[name]
    return document, PICTURES[document["section"]][suffix](document)


def test_pictures_are_drawn_again_from_the_results(tmp_path):
    for path in RESULTS:
        (tmp_path / path.name).write_text(path.read_text())
    assert command.main(["--redraw", "--results", str(tmp_path)]) == 0
    for name, suffix in ALL:
        assert (tmp_path / f"{name}{suffix}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, suffix", ALL)
def test_pictures_name_their_units_and_their_rounds(name, suffix):
    """No text stands among the data, where a curve could cross it."""
    document, figure = drawn(name, suffix)
    assert f"n = {document['num_rounds']} round" in figure.get_supxlabel()
    assert document["machine"]["commit"] in figure.get_supxlabel()
    for panel in figure.axes:
        assert not panel.texts and panel.get_xlim()[0] == 0
        assert any(word in panel.get_xlabel() for word in ("seconds", "as a multiple of", "GB", "TP (PP=2)"))
        assert any(word in panel.get_ylabel() for word in ("seconds", "MiB")) or len(panel.get_yticklabels())


@pytest.mark.parametrize("name", [name for name, suffix in ALL if DOCUMENTS[name]["section"] in ("speed", "groups", "options", "clones")])
def test_a_panel_has_one_baseline_and_every_round(name):
    """The baseline is named, its line is in sight, and no bar stands for it: its own ratio is 1 by definition."""
    document, figure = drawn(name)
    cases = {case["name"]: case for case in document["cases"]}
    shown = []
    for panel in figure.axes:
        names = [label.get_text() for label in panel.get_yticklabels()]
        baselines = {cases[own]["reference"] for own in names}
        assert panel.get_xlabel() == f"time, as a multiple of {baselines.pop()}" and not baselines
        points = [list(line.get_xdata()) for line in panel.lines if line.get_label() == "rounds"]
        assert points == [cases[own]["ratios"] for own in names]
        assert panel.get_xlim()[1] > max(1, *map(max, points))
        shown += names
    assert sorted(shown) == sorted(own for own, case in cases.items() if case["reference"] != own)


def test_memory_is_drawn_until_the_output_is_durable():
    """Those that need a `sync` get a dashed line from their own end to the end of that."""
    document, figure = drawn("peers", "_memory")
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    needing = [case for case in document["cases"] if case["needs_sync"]]
    assert [line.get_xdata()[1] for line in dashed] == [case["seconds"][-1] for case in needing]
    for line, case in zip(dashed, needing):
        assert line.get_xdata()[1] - line.get_xdata()[0] == pytest.approx(case["sync_seconds"][-1], abs=0.05)
    assert len(dashed) < len(document["cases"]) and "the last of 3" in figure.axes[0].get_xlabel()


def test_growth_has_one_line_and_it_is_ours():
    document, figure = drawn("growth_full")
    fit = of_growth(document["cases"])
    assert fit["intercept"] > 0 and fit["r2"] > 0.99
    lines = [line for panel in figure.axes for line in panel.lines if line.get_linestyle() == "-"]
    assert [list(line.get_ydata())[0] for line in lines] == [fit["intercept"]]
    num_runs = sum(len(case["seconds"]) for case in document["cases"] if not case.get("is_ours") or case["tp"] == 4)
    assert sum(len(line.get_xdata()) for line in figure.axes[0].lines if line not in lines) == num_runs


def test_two_sizes_make_no_line():
    cases = [{"is_ours": True, "tp": 4, "source_nbytes": size, "seconds": [1.0, 2.0]} for size in (1, 2)]
    assert of_growth(cases) is None


def test_the_noise_of_the_options_is_that_of_one_run_twice():
    """With more cores the default has more workers, and nothing is the same run."""
    document, figure = drawn("options")
    same = [ratio for case in document["cases"] if case["name"] in ("default", "--workers 1") for ratio in case["ratios"]]
    (band,) = figure.axes[0].patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((min(same), max(same)))
    many = document | {"machine": document["machine"] | {"num_cores": 64}}
    assert not PICTURES["options"][""](many).axes[0].patches
