"""The interface for notebooks: what it takes, what it tells, what it raises."""
import json
import threading

import pytest
from conversions import tensors, tree
from sources import make_source

from stream_reshard import api
from stream_reshard.errors import Interrupted, Refused, StreamReshardError, UsageError


def test_plan_run_verify(tmp_path):
    """Strings as folders, words as sizes; progress rises to the whole, and the plan is told before and after."""
    source, seen = make_source(tmp_path / "hf"), []
    conversion = api.plan(str(source), str(tmp_path / "nt"), tp=2, pp=2, max_memory="1GiB", workers=1)
    assert "TP=2 PP=2 DP=1" in str(conversion) and not (tmp_path / "nt").exists()
    result = api.run(conversion, progress=lambda done, total: seen.append((done, total)))
    nbytes = conversion.facts["target"]["nbytes"]
    assert seen == sorted(seen) and seen[-1] == (nbytes, nbytes) and len(seen) == conversion.facts["num_jobs"]
    assert result.facts["peak_nbytes"] == result.peak_nbytes > 2**20 and result.seconds > 0
    assert result.lines[0].startswith("done ")
    assert api.verify(str(source), str(tmp_path / "nt")).facts["equal"]
    assert api.inspect(str(tmp_path / "nt")).facts["topologies_tp_pp"] == [(2, 2)]
    assert api.diff(str(tmp_path / "nt"), str(tmp_path / "nt")).facts["same"]


def test_a_notebook_is_offered_the_public_names():
    import stream_reshard
    assert dir(api) == sorted(api.__all__) and dir(stream_reshard) == sorted(stream_reshard.__all__)


def test_the_way_back_and_a_template(tmp_path):
    source = make_source(tmp_path / "hf")
    api.run(api.plan(source, tmp_path / "nt", tp=2))
    api.run(api.plan(tmp_path / "nt", tmp_path / "back", to="hf", max_shard_size="2KB"))
    assert tensors(tmp_path / "back").keys() == tensors(source).keys()
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    api.run(api.plan(source, tmp_path / "filled", template=tmp_path / "nt"))
    assert tree(tmp_path / "filled") == tree(tmp_path / "nt")


def test_a_run_that_was_done_says_so(tmp_path):
    source = make_source(tmp_path / "hf")
    assert not api.run(api.plan(source, tmp_path / "nt")).already_done
    again = api.run(api.plan(source, tmp_path / "nt"))
    assert again.already_done and again.facts["already_done"] and "holds this conversion already" in again.lines[0]
    assert not api.run(api.plan(source, tmp_path / "nt", overwrite=True)).already_done


def test_another_thread_can_stop_it(tmp_path):
    source, stop = make_source(tmp_path / "hf"), api.Stop()
    conversion = api.plan(source, tmp_path / "nt", tp=2, workers=1)

    def end(done, total):
        thread = threading.Thread(target=stop.request)
        thread.start()
        thread.join()

    with pytest.raises(Interrupted):
        api.run(conversion, end, stop)
    assert not (tmp_path / "nt").exists()
    assert api.run(api.plan(source, tmp_path / "nt", tp=2, workers=1)).facts["num_files_kept"] > 0
    api.verify(source, tmp_path / "nt")


def test_errors_are_for_people_and_list_everything(tmp_path):
    source = make_source(tmp_path / "hf")
    with pytest.raises(Refused) as refused:
        api.plan(source, tmp_path / "nt", tp=3, rope="neox", checkpoint_version="1.2")
    assert len(refused.value.problems) == 1 and isinstance(refused.value, StreamReshardError)
    with pytest.raises(Refused) as refused:
        api.plan(source, tmp_path / "nt", tp=3, pp=9)
    assert [type(problem) for problem in refused.value.problems] == [UsageError] * len(refused.value.problems)
    assert len(refused.value.problems) >= 2
    with pytest.raises(UsageError, match="is not a size"):
        api.plan(source, max_memory="much")
    with pytest.raises(UsageError, match="tensor_parallel"):
        api.plan(source, tensor_parallel=4)
    api.run(api.plan(source, tmp_path / "nt"))
    path = next((tmp_path / "nt").rglob("*o_proj/*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Refused, match="o_proj"):
        api.verify(source, tmp_path / "nt")


def test_public_names_are_there_and_results_are_short(tmp_path):
    """Every name that the package exports can be had from it; a result fits on a line of a notebook."""
    import stream_reshard
    assert all(getattr(stream_reshard, name) for name in stream_reshard.__all__)
    source = make_source(tmp_path / "hf")
    conversion = api.plan(source, tmp_path / "nt", tp=2)
    result = api.run(conversion)
    reports = [conversion, result, api.verify(source, tmp_path / "nt"), api.inspect(source), api.diff(source, source)]
    for report in reports:
        assert len(repr(report).splitlines()) == 1 and len(repr(report)) < 400
        assert json.dumps(report.facts) and str(report) == "\n".join(report.lines)
