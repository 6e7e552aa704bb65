"""Every command in every document runs as it is written, one after the other, in a folder of its own."""
import re
import shutil

import pytest
from documents import DOCUMENTS, ROOT, STAND_INS, blocks, prepare, run
from training import make_training

ELSEWHERE = ("<!-- test command -->", "<!-- demo command -->")
"""Marks above blocks that other tests run, or .ci/run; so does test_readme.py its example of Python."""

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 12}
"""A model for four tensor-parallel ranks; its vocabulary needs no padding there."""

LANGUAGES = {"bash", "text", "python", "yaml", ""}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_run_as_they_stand_there(path, tmp_path):
    """bash and Python alike, in the order of the document: one works with what the others made."""
    env = prepare(tmp_path)
    if path.name == "CONTRIBUTING.md":  # Its reader stands in a clone.
        (tmp_path / "tests").symlink_to(ROOT / "tests")
        (tmp_path / "docs").mkdir()
    if path.stem == "training-runs":  # Its reader has a training, and the folder in which it saves.
        shutil.rmtree(make_training(tmp_path / "run" / "4", tp=2, pp=2, dp=2, config=HEADS).with_name("4-source"))
        (tmp_path / "run" / "latest.txt").write_text("4")
    script = []
    for before, language, code in blocks(path.read_text(), ("bash", "python")):
        if before in ELSEWHERE or (path.name == "README.md" and language == "python"):
            continue
        script.append(code if language == "bash" else f"python - <<'END'\n{code}END\n")
    if script:
        run("\n".join(script), tmp_path, env)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_documents_keep_to_their_form(path):
    """Known languages, short lines outside tables and code, links that lead somewhere."""
    text = path.read_text()
    assert text.startswith("# ") and text.endswith("\n") and text.count("```") % 2 == 0
    assert set(re.findall(r"^```(\w*)$", text, re.M)) <= LANGUAGES
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    assert not [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)", prose):
        assert (path.parent / link).exists(), link
    for anchor in re.findall(r"\]\(#([^)]+)\)", prose):
        titles = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
        assert anchor in titles, anchor


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in text, path.name


def test_stand_ins_refuse_other_spellings(tmp_path):
    """A stand-in that took everything would hold nothing."""
    env = prepare(tmp_path)
    assert {path.name for path in STAND_INS.iterdir() if path.is_file()} >= {"hf", "git", "torchrun", "pip", "srun"}
    for line in ("hf get ORG/NAME --local-dir SRC", "hf download ORG --local-dir SRC", "hf download ORG/NAME --to SRC",
                 "git clone https://example.org/nanotron", "pip install nothing_of_ours", "torchrun run_train.py",
                 "torchrun --nnodes=2 --nproc_per_node=4 run_train.py --config-file x", "srun --frobnicate true"):
        with pytest.raises(AssertionError):
            run(line, tmp_path, env)


def test_blocks_are_found():
    assert blocks("a\n```bash\nls\npwd\n```\nb\n```text\nno\n```\n", ["bash"]) == [("a", "bash", "ls\npwd\n")]
