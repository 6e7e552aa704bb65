"""The measuring core tells the truth of what is known beforehand; tables are what the committed results say."""
import ast
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.bench import Bench
from benchmarks.fits import line
from benchmarks.measure import Bytes, Measurement, Sample, measure, thinned
from benchmarks.rounds import Case, Outcome, Plan, locked, ratios_of, run_rounds
from benchmarks.sections import OPTIONS, SECTIONS
from benchmarks.sources import NBYTES, Source, Sources
from benchmarks.synthetic import SHAPES, _llama, write_source
from benchmarks.tables import ABOUT, COLUMNS, markdown_of, spread, table_of

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
MIB = 2**20


def python(code, *arguments):
    return [sys.executable, "-S", "-c", code, *map(str, arguments)]


def run_of(seconds):
    return Measurement(0, seconds, 0.0, 1, 1, Bytes(), 0, ())


HOLD = "import time; b = bytearray(%d << 20); b[::4096] = bytes([1]) * len(b[::4096]); time.sleep(0.2)"


def test_memory_of_a_process_that_holds_a_known_amount():
    run = measure(python(HOLD % 100))
    assert run.exit_code == 0 and run.seconds > 0.2
    assert 100 * MIB < run.peak_anon <= run.peak_rss < 125 * MIB
    assert max(sample.rss for sample in run.series) > 100 * MIB


def test_memory_is_summed_over_the_tree():
    """Two children at once hold more than either."""
    code = ("import subprocess, sys; c = [sys.executable, '-S', '-c', %r]\n"
            "for p in [subprocess.Popen(c), subprocess.Popen(c)]: p.wait()" % (HOLD % 50))
    assert 100 * MIB < measure(python(code)).peak_anon < 130 * MIB


def test_a_peak_between_two_samples_is_not_lost():
    assert measure(python("b = b'1' * (200 << 20); del b")).peak_rss > 200 * MIB


def test_bytes_of_a_process_and_its_children_count_once(tmp_path):
    (tmp_path / "in").write_bytes(bytes(8 * MIB))
    moved = measure(["sh", "-c", "cat in > out1; cat in in > out2"], cwd=tmp_path).bytes
    assert 24 * MIB <= moved.rchar < 24.5 * MIB
    assert 24 * MIB <= moved.wchar < 24.1 * MIB


def test_how_a_command_ends_is_kept():
    assert measure(["sh", "-c", "echo a; echo b >&2; exit 3"]).exit_code == 3
    run = measure(["sh", "-c", "echo a; echo b >&2; kill -9 $$"])
    assert (run.exit_code, run.stdout, run.stderr) == (-9, "a\n", "b\n")


@pytest.mark.parametrize("length", [1, 7, 199, 200, 201, 5000])
def test_a_thinned_series_keeps_its_order_and_its_peak(length):
    series = [Sample(float(i), i * 7919 % 5003, 0) for i in range(length)]
    kept = thinned(series, 200)
    assert len(kept) <= 200 and list(kept) == sorted(kept) and set(kept) <= set(series)
    assert max(s.rss for s in kept) == max(s.rss for s in series)


def test_ratios_are_taken_within_a_round():
    """A round in which one of the two is missing has none."""
    runs = {n: run_of(s) for n, s in {0: 2.0, 2: 9.0, 3: 1.0}.items()}
    others = Outcome(None, {n: run_of(s) for n, s in {0: 1.0, 1: 5.0, 2: 3.0}.items()})
    assert ratios_of(runs, others) == [2.0, 3.0] and ratios_of(runs, None) == []


def case(tmp_path, name, script, **more):
    output = tmp_path / "out" / "run"
    return Case(name, ("sh", "-c", script, str(output), name), (tmp_path,), output, 1000, reference="a", **more)


def test_rounds_turn_their_order_and_start_from_nothing(tmp_path):
    script = f'echo $1 >> {tmp_path}/log; mkdir "$0" && head -c 1000 /dev/zero > "$0/file"'
    results = run_rounds([case(tmp_path, name, script) for name in "abc"], Plan(3, settles=False))
    assert (tmp_path / "log").read_text().split() == list("abccbaabc")
    assert [len(result["ratios"]) for result in results] == [3, 3, 3]
    assert results[0]["ratios"] == [1, 1, 1] and not list((tmp_path / "out").iterdir())


def test_what_fails_is_said_and_not_tried_again(tmp_path):
    told = {"fails": "echo no room >&2; exit 6", "killed": "kill -9 $$", "short": 'mkdir "$0"; echo > "$0/file"',
            "unknown": "echo 'error: unrecognized arguments: --io' >&2; exit 2"}
    cases = [case(tmp_path, name, f"echo $1 >> {tmp_path}/log; {script}") for name, script in told.items()]
    cases.append(case(tmp_path, "skipped", "", skipped="not installed: x"))
    results = run_rounds(cases, Plan(2, settles=False))
    assert [result["status"] for result in results] == [
        "did not finish (exit code 6: no room)", "did not finish (signal 9)", "wrote 1 of 1000 bytes",
        "this version does not know the flag", "not installed: x"]
    assert len((tmp_path / "log").read_text().split()) == 4
    table = table_of({"section": "peers", "cases": results})
    assert all(f"| {result['name']} | {result['status']} |" in table for result in results)


TINY = _llama(64, 192, 4, 8, 8, 512)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of half a megabyte in two shards."""
    root = tmp_path_factory.mktemp("sources") / "tiny"
    write_source(root, TINY, 400_000)
    return Source(root, sum(path.stat().st_size for path in root.glob("*.safetensors")))


def test_this_tool_beside_cp(tmp_path, source):
    bench = Bench(tmp_path, Sources(source.path.parent), "tiny", Plan(1, settles=False))
    copy, ours = bench.run([bench.copy(source), bench.ours("ours", source, 4, 2)])
    assert (copy["status"], ours["status"]) == ("ok", "ok")
    assert ours["ratios"] == [pytest.approx(ours["seconds"][0] / copy["seconds"][0], rel=0.02)]
    assert MIB < ours["peak_anon"][0] <= ours["peak_rss"][0] <= ours["limit_nbytes"] == 256 * MIB
    assert ours["told"]["peak_nbytes"] <= ours["peak_rss"][0] + MIB
    assert all(result["bytes"][0]["wchar"] > source.nbytes for result in (copy, ours))
    assert bench.sources.get("tiny").nbytes == source.nbytes and not bench.sources.made


def test_peers_do_the_whole_job(tmp_path, source, monkeypatch):
    """naive and get_slice agree on every file; consolidation gives back what was sharded for it."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from benchmarks.peers import consolidate, get_slice, naive
    for peer in (naive, get_slice):
        monkeypatch.setattr(sys, "argv", ["", str(source.path), str(tmp_path / peer.__name__)])
        peer.main()
    made, same = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*.safetensors")}
                  for root in (tmp_path / naive.__name__, tmp_path / get_slice.__name__))
    assert made == same and sum(map(len, made.values())) > source.nbytes
    consolidate.prepare(source.path, tmp_path / "sharded")
    consolidate.consolidate(tmp_path / "sharded", tmp_path / "whole")
    whole, given = ({name: tensor.view(torch.int16) for path in root.glob("*.safetensors")
                     for name, tensor in load_file(path).items()} for root in (tmp_path / "whole", source.path))
    assert whole.keys() == given.keys() and all(whole[name].equal(given[name]) for name in given)


def test_a_straight_line_is_found():
    fit = line([(1, 5), (2, 7), (4, 11)])
    assert (fit["intercept"], fit["slope"], fit["r2"], fit["num_points"]) == (3, 2, 1, 3)


def test_spread_and_sections():
    assert spread([3.0, 1.0, 2.0]) == "1.00 / 2.00 / 3.00" and spread([]) == "-"
    assert SECTIONS.keys() == COLUMNS.keys() == ABOUT.keys()
    assert NBYTES.keys() <= SHAPES.keys() and len(dict(OPTIONS)) == len(OPTIONS)


def test_a_lock_is_held(tmp_path):
    import fcntl
    with locked(tmp_path / "lock", fcntl.LOCK_EX), open(tmp_path / "lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_tables_are_what_the_results_say(path):
    document = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == markdown_of(document)
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("path", ["README.md", "docs/memory-and-speed.md"])
def test_figures_of_documents_are_those_of_the_results(path):
    text = (ROOT / path).read_text()
    tables = re.findall(r"<!-- benchmark (\w+) -->\n\n?((?:\|.*\n)+)", text)
    assert tables
    for name, table in tables:
        document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert table == table_of(document), name
    for picture in re.findall(r"\(\.\./(benchmarks/results/[^)]+)\)", text):
        assert (ROOT / picture).exists(), picture


def test_documents_are_written_from_the_results(tmp_path, monkeypatch):
    """They are what the command makes of them, and what a result no longer says goes from them."""
    (tmp_path / "docs").mkdir()
    for path in ("README.md", "docs/memory-and-speed.md"):
        text = (ROOT / path).read_text()
        (tmp_path / path).write_text(text.replace("| **stream_reshard** |", "| **another** |"))
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert command.main(["--readme"]) == 0
    for path in ("README.md", "docs/memory-and-speed.md"):
        assert (tmp_path / path).read_text() == (ROOT / path).read_text()
    (tmp_path / "docs/memory-and-speed.md").write_text("no mark")
    with pytest.raises(ValueError, match="has no line"):
        command.main(["--readme"])


def test_files_and_functions_are_short():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert len(path.read_text().splitlines()) < 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path.name}: {node.name}"
