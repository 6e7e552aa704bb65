"""The command line: flags to Options, results to stdout, progress and messages to stderr, errors to exit codes."""
from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stream_reshard import __version__, memory
from stream_reshard.convert import Conversion, Options, plan_conversion, run_conversion
from stream_reshard.errors import Interrupted, ResourceError, StreamReshardError, quoted
from stream_reshard.layouts.nanotron import VERSIONS
from stream_reshard.layouts.nanotron_limits import ALLOWABLE
from stream_reshard.plan import Job
from stream_reshard.report import as_json, plan_lines, resume_hint, summary, summary_lines
from stream_reshard.topology import Topology

_COMMANDS = ("plan", "verify", "inspect", "demo")

_MAX_LINES = 50
"""Problems that are printed; the worst come first."""

_EPILOG = """\
exit codes: 0 ok, 1 unexpected, 2 usage, 3 source refused or changed, 4 destination refused, 5 verify found differences,
6 resources (resumable), 7 locked, 130/143 interrupted (resumable)
other commands: plan SRC [DST], verify SRC DST, inspect DIR, demo; each has its own --help"""


def _parser(command: str) -> argparse.ArgumentParser:
    name = "stream-reshard" + ("" if command == "convert" else f" {command}")
    parser = argparse.ArgumentParser(prog=name, description=_DESCRIPTIONS[command], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=_EPILOG if command == "convert" else None)
    if command == "convert":
        parser.add_argument("--version", action="version", version=f"stream-reshard {__version__}")
    if command in ("convert", "plan", "verify"):
        parser.add_argument("source", metavar="SRC", type=Path, help="a folder of Hugging Face safetensors shards")
        parser.add_argument("destination", metavar="DST", type=Path, nargs="?" if command == "plan" else None,
                            help="the folder to be made; it must be absent or empty" if command != "verify"
                            else "the Nanotron checkpoint to compare")
    if command == "inspect":
        parser.add_argument("source", metavar="DIR", type=Path, help="a checkpoint folder of either format")
    if command in ("convert", "plan"):
        _add_conversion_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--quiet", action="store_true", help="print no progress and no plan, errors only")
    return parser


_DESCRIPTIONS = {
    "convert": "Cut a Hugging Face checkpoint for Nanotron's tensor, pipeline and data parallelism, in bounded memory.",
    "plan": "Say what a conversion would do and need; write nothing.",
    "verify": "Compare every weight of a Nanotron checkpoint, through its own headers, with its Hugging Face source.",
    "inspect": "Say what a checkpoint folder holds.",
    "demo": "Make a small Llama, convert it to TP=2 PP=2, and verify the result. Needs no download."}


def _add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tp", type=int, default=1, metavar="T", help="tensor-parallel ranks (default 1)")
    add("--pp", type=int, default=1, metavar="P", help="pipeline stages, balanced as Nanotron does (default 1)")
    add("--dp", type=int, default=1, metavar="D", help="data-parallel replicas; changes no weight file (default 1)")
    add("--max-memory", default="512MiB", metavar="SIZE",
        help="limit on the peak resident set of the whole process tree (default 512MiB)")
    add("--workers", type=int, default=None, metavar="N", help="threads that move bytes (default 2; 1 below 96MiB)")
    add("--vocab-multiple", type=int, default=1, metavar="N",
        help="Nanotron's make_vocab_size_divisible_by (default 1)")
    add("--dtype", default="keep", choices=("keep", "bfloat16", "float16", "float32"),
        help="cast the weights, needs torch (default keep)")
    add("--rope", default="auto", choices=("auto", "neox", "interleaved"),
        help="order of q and k rows in a head: neox as in Hugging Face; auto: interleaved for format 1.2 only")
    add("--nanotron-config", default="auto", choices=("auto", "LlamaConfig", "Qwen2Config"),
        help="Nanotron's config class (default: LlamaConfig for Llama, Qwen2Config for Qwen2)")
    add("--checkpoint-version", default="1.5", choices=VERSIONS,
        help="format version: 1.5 main, 1.4 trees from September 2024 on, 1.2 release 0.4 (default 1.5)")
    add("--allow", action="append", default=[], metavar="NAME",
        help="accept something Nanotron will not honour: " + ", ".join(ALLOWABLE))
    add("--restart", action="store_true", help="throw away what an interrupted run left in DST.partial")


def options_of(arguments: argparse.Namespace) -> Options:
    """The one frozen value that the flags mean."""
    max_memory = memory.parse_nbytes(arguments.max_memory)
    workers = arguments.workers if arguments.workers is not None else 1 if max_memory < 96 * 2**20 else 2
    return Options(
        source=arguments.source, destination=arguments.destination,
        topology=Topology(arguments.tp, arguments.pp, arguments.dp), config_class=arguments.nanotron_config,
        version=arguments.checkpoint_version, rope=arguments.rope, vocab_multiple=arguments.vocab_multiple,
        dtype=arguments.dtype, allow=tuple(arguments.allow), max_memory=max_memory, num_workers=workers,
        restart=arguments.restart)


def _print(arguments: argparse.Namespace, document: dict[str, Any], lines: Iterable[str]) -> None:
    if arguments.json:
        print(json.dumps(document, indent=1))
    elif not arguments.quiet:
        print("\n".join(lines))


def _progress(conversion: Conversion, quiet: bool) -> tuple[Callable[[Job], None], Callable[[], None]]:
    """(called with each finished job, called at the end); silent when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        return lambda job: None, lambda: None
    from tqdm import tqdm
    bar = tqdm(total=conversion.plan.target.nbytes, unit="B", unit_scale=True, file=sys.stderr)

    def advance(job: Job) -> None:
        bar.update(job.nbytes)
        bar.set_postfix_str(f"memory {memory.human(memory.resident())}")

    return advance, bar.close


def convert_command(arguments: argparse.Namespace) -> None:
    """`SRC DST`: plan, print the plan, run it, print the summary."""
    begin = time.monotonic()
    conversion = plan_conversion(options_of(arguments))
    if not (arguments.json or arguments.quiet):
        print("\n".join(plan_lines(conversion)), flush=True)
    advance, close = _progress(conversion, arguments.quiet)
    try:
        run_conversion(conversion, advance)
    except (Interrupted, StreamReshardError) as error:
        if error.exit_code in (6, 130, 143):
            print(resume_hint(conversion), file=sys.stderr)
        raise
    finally:
        close()
    seconds, peak = time.monotonic() - begin, memory.peak_resident()
    _print(arguments, summary(conversion, seconds, peak), summary_lines(conversion, seconds, peak))


def plan_command(arguments: argparse.Namespace) -> None:
    """`plan SRC [DST]`: everything up to and without the writing."""
    conversion = plan_conversion(options_of(arguments))
    _print(arguments, as_json(conversion), plan_lines(conversion))


def verify_command(arguments: argparse.Namespace) -> None:
    """`verify SRC DST`."""
    from stream_reshard.verify import verify
    facts = verify(arguments.source, arguments.destination)
    _print(arguments, facts, [f"verified {facts['num_files']} files, {facts['num_elements']} weights: all equal"])


def inspect_command(arguments: argparse.Namespace) -> None:
    """`inspect DIR`."""
    from stream_reshard.inspect import inspect
    facts = inspect(arguments.source)
    _print(arguments, facts, (f"{key:<22} {value}" for key, value in facts.items()))


def demo_command(arguments: argparse.Namespace) -> None:
    """`demo`."""
    from stream_reshard.demo import demo
    facts = demo(quiet=arguments.quiet or arguments.json)
    _print(arguments, facts, [f"demo     converted and verified {facts['num_elements']} weights: all equal"])


_RUN = {"convert": convert_command, "plan": plan_command, "verify": verify_command, "inspect": inspect_command,
        "demo": demo_command}


def _stop(signal_number: int, frame: object) -> None:
    signal.signal(signal_number, signal.SIG_DFL)  # A second signal stops at once.
    raise Interrupted(f"interrupted by {signal.Signals(signal_number).name}", signal_number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in _COMMANDS else ("convert", argv)
    arguments = _parser(command).parse_args(rest)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        _RUN[command](arguments)
        return 0
    except StreamReshardError as error:
        lines = str(error).splitlines()
        for line in lines[:_MAX_LINES]:
            print(f"error: {line}", file=sys.stderr)
        if len(lines) > _MAX_LINES:
            print(f"error: and {len(lines) - _MAX_LINES} more", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"error: {quoted(error.filename or 'a file')}: {error.strerror}", file=sys.stderr)
        return ResourceError.exit_code


def script() -> None:
    """The installed command `stream-reshard`."""
    sys.exit(main())
