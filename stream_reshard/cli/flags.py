"""The flags of every command, and nothing else: what they mean is for `cli` to say."""
from __future__ import annotations

import argparse
from pathlib import Path

from stream_reshard import __version__
from stream_reshard.errors import quoted
from stream_reshard.formats.nanotron.rules import VERSIONS
from stream_reshard.formats.unsupported import ALLOWABLE

COMMANDS = ("plan", "verify", "inspect", "diff", "demo")
"""The words that may stand in front; without one of them it is a conversion."""


def _folder(text: str) -> Path:
    """A path; an empty one is a variable that nobody set, not the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _number(text: str) -> int:
    """An int that every system call and file format can hold."""
    if len(text) > _MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{quoted(text)} has more than {_MAX_DIGITS} digits")
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number") from error


_MAX_DIGITS = 15

_EPILOG = """\
exit codes: 0 ok, 1 unexpected, 2 usage, 3 source refused or changed, 4 destination refused, 5 verify found differences,
6 resources (resumable), 7 locked, 130/143 interrupted (resumable)
other commands: plan SRC [DST], verify SRC DST, inspect DIR, diff A B, demo; each has its own --help"""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command; "convert" is the one without a word."""
    name = "stream-reshard" + ("" if command == "convert" else f" {command}")
    parser = argparse.ArgumentParser(prog=name, description=_DESCRIPTIONS[command], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=_EPILOG if command == "convert" else None)
    if command == "convert":
        parser.add_argument("--version", action="version", version=f"stream-reshard {__version__}")
    if command in ("convert", "plan", "verify"):
        parser.add_argument("source", metavar="SRC", type=_folder,
                            help="a folder of Hugging Face safetensors shards"
                            + (", or a Nanotron checkpoint" if command == "verify" else ""))
        parser.add_argument("destination", metavar="DST", type=_folder, nargs="?" if command == "plan" else None,
                            help="the folder to be made; it must be absent or empty" if command != "verify"
                            else "the checkpoint to compare with it, of either format")
    if command == "inspect":
        parser.add_argument("source", metavar="DIR", type=_folder, help="a checkpoint folder of either format")
        parser.add_argument("--values", action="store_true", help="read every weight, and count NaN and infinities")
    if command == "diff":
        parser.add_argument("source", metavar="A", type=_folder, help="a checkpoint folder of either format")
        parser.add_argument("destination", metavar="B", type=_folder, help="another one of the same model")
    if command in ("convert", "plan", "verify"):
        _add_resource_flags(parser)
    if command in ("convert", "plan"):
        _add_conversion_flags(parser)
        _add_run_flags(parser)
    if command == "verify":
        _add_verify_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--quiet", action="store_true", help="print no progress and no plan, errors only")
    return parser


_DESCRIPTIONS = {
    "convert": "Cut a Hugging Face checkpoint for Nanotron's tensor, pipeline and data parallelism, in bounded memory.",
    "plan": "Say what a conversion would do and need; write nothing.",
    "verify": "Prove that two folders hold the same model: every weight, through the headers of the files themselves.",
    "inspect": "Say what a checkpoint folder holds.",
    "diff": "Say in what the layouts of two checkpoints differ, tensor by tensor; no weight is read.",
    "demo": "Make a small Llama, convert it to TP=2 PP=2, and verify the result. Needs no download."}


def _add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", default=None, choices=("nanotron", "hf"),
        help="what DST is to be (default nanotron; must be said where SRC is a Nanotron checkpoint)")
    add("--max-shard-size", default="5GB", metavar="SIZE",
        help="bytes of tensors in a Hugging Face shard, at most (default 5GB)")
    add("--vocab-size", type=_number, default=None, metavar="N",
        help="rows of the embedding without padding, of a Nanotron SRC that was not made by this tool")
    add("--template", type=_folder, default=None, metavar="DIR",
        help="a Nanotron checkpoint, such as one saved from a random model: fill exactly its files, slices and dtypes")
    add("--tokenizer", type=_folder, default=None, metavar="DIR",
        help="take tokenizer and generation files from there (default: SRC)")
    add("--tp", type=_number, default=1, metavar="T", help="tensor-parallel ranks (default 1)")
    add("--pp", type=_number, default=1, metavar="P", help="pipeline stages, balanced as Nanotron does (default 1)")
    add("--dp", type=_number, default=1, metavar="D", help="data-parallel replicas; changes no weight file (default 1)")
    add("--vocab-multiple", type=_number, default=1, metavar="N",
        help="Nanotron's make_vocab_size_divisible_by (default 1)")
    add("--rope", default="auto", choices=("auto", "neox", "interleaved"),
        help="order of q and k rows in a head: neox as in Hugging Face; auto: interleaved for format 1.2 only")
    add("--nanotron-config", default="auto", choices=("auto", "LlamaConfig", "Qwen2Config"),
        help="Nanotron's config class (default: LlamaConfig for Llama, Qwen2Config for Qwen2)")
    add("--checkpoint-version", default="1.5", choices=VERSIONS,
        help="format version: 1.5 main, 1.4 trees from September 2024 on, 1.2 release 0.4 (default 1.5)")


def _add_resource_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-memory", default="512MiB", metavar="SIZE",
        help="limit on the peak resident set of the whole process tree (default 512MiB)")
    add("--workers", type=_number, default=None, metavar="N",
        help="jobs that move bytes at the same time, within the one limit (default: an eighth of the cores, 1 to 8)")
    add("--dtype", default="keep", choices=("keep", "bfloat16", "float16", "float32"),
        help="cast the weights of the source, needs torch (default keep)")
    add("--allow", action="append", default=[], metavar="NAME",
        help="accept something Nanotron will not honour: " + ", ".join(ALLOWABLE))


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--io", default="auto", choices=("auto", "mmap", "pread"),
        help="how the source is read: into buffers, or written straight from a mapping (default auto: what measured "
             "faster on its file system)")
    add("--digests", default="auto", choices=("auto", "all", "none"),
        help="which tensor files get a digest in the manifest: auto leaves out those that share blocks with the "
             "source, which are not read; all reads them back")
    add("--verify", action="store_true", help="compare everything with the source before DST gets its name")
    add("--source-sha256", default=None, metavar="FILE",
        help="check the source's files first: FILE as sha256sum writes it, or `cache`, where they are links to blobs "
             "named by their sha256")
    add("--overwrite", action="store_true", help="replace the Nanotron checkpoint at DST, once the new one is complete")
    add("--restart", action="store_true", help="throw away what an interrupted run left in DST.partial")
    add("--break-lock", action="store_true", help="take the place of a run on another machine that is known to be dead")


def _add_verify_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--vocab-size", type=int, default=None, metavar="N",
        help="rows of the embedding without padding, of a Nanotron SRC that was not made by this tool")
    add("--forward", action="store_true",
        help="also run both over the same tokens, layer by layer in float32, and compare the outcome; needs torch")
    add("--text", type=_folder, default=None, metavar="FILE",
        help="the text to run, by the model's own tokenizer (default: random tokens)")
    add("--tokens", type=_number, default=None, metavar="N", help="tokens to run, at most (default 128)")
    add("--tolerance", type=float, default=None, metavar="X",
        help="largest difference of a forward pass, relative to the largest value of a token (default 1e-4)")
    add("--plot", type=_folder, default=None, metavar="FILE.png",
        help="draw the differences by layer; needs matplotlib")
    add("--quick", action="store_true", help="structure, configs and digests only; reads no weight of SRC")
    add("--sample", default="100%", metavar="PERCENT", help="compare a seeded part of the weights (default 100%%)")
    add("--seed", type=_number, default=0, metavar="N", help="chooses the sample (default 0)")
    add("--edited", action="append", default=[], metavar="PATH",
        help="a file of DST that was edited on purpose, such as config.yaml: its digest is not compared")
