"""The command line: arguments in, text out. Each command is one file, imported when it is asked for."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from tokenmix import __version__

__all__ = ["main"]

EXIT_FINE, EXIT_FINDINGS, EXIT_USAGE, EXIT_INTERNAL = 0, 1, 2, 3

# Command -> what it does. Arguments stand in the command's own file, which is imported when it is asked for.
COMMANDS = {
    "build": "compile a spec, write its PyTorch source, and run one image through the module",
    "flops": "parameters and FLOPs of specs, exactly, beside the figures in the papers",
    "table": "the tables of a paper as reproduced, printed figures beside computed ones",
    "weights": "what a checkpoint holds; checkpoints of others rewritten for a spec's module",
    "check": "everything that is wrong with specs",
    "show": "a spec as resolved, or the definition of a block or op",
    "list": "the specs, blocks and ops there are",
    "bench": "speed of specs beside their references, other models and the machine's limit",
    "profile": "where a pass spends its time, block by block",
    "doctor": "what runs fast on this machine, what does not, and why",
    "fmt": "print specs and block files in canonical form",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 if all is well, 1 for findings, 2 for wrong usage, 3 for a bug of tokenmix."""
    argv = list(sys.argv[1:] if argv is None else argv)
    gc.set_threshold(
        100_000
    )  # a short run makes many small records and drops few; a fifth of the time went into looking
    parser = argparse.ArgumentParser(
        prog="tokenmix",
        description="Token-mixer vision backbones: written as text, counted exactly, compiled to PyTorch.",
        epilog="example: tokenmix flops specs/mixformer_b4.yaml --by stage\nhelp on one: tokenmix COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tokenmix {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((a for a in argv if not a.startswith("-")), None)
    for name, what in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            module = importlib.import_module(f"tokenmix.cli.{name}_command")
            module.arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more while closing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FINE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    from tokenmix.dsl.diagnostics import FindingsError, render

    if isinstance(error, FindingsError):
        print(render(error.findings), file=sys.stderr)
        return EXIT_FINDINGS
    if isinstance(error, ImportError) and type(error).__name__ == "MissingTorch":
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    # Weights that do not fit are an answer, as findings are; a file that cannot be read is not what was meant.
    if any(base.__name__ == "WeightsError" for base in type(error).__mro__):
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(error))
        print(f"error: {text}", file=sys.stderr)
        return EXIT_USAGE if type(error).__name__ == "CheckpointError" else EXIT_FINDINGS
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="tokenmix-", suffix=".txt", delete=False) as log:
        traceback.print_exception(error, file=log)
    print(
        f"internal error: {type(error).__name__}: {error}\nThis is a bug of tokenmix, not of your spec. "
        f"Please report it with {log.name}.",
        file=sys.stderr,
    )
    return EXIT_INTERNAL
