"""Running a command line: parse, dispatch, and turn problems into one line and an exit status.

Importing this module, and answering ``--help``, costs no torch: handlers import what they need when they are called.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from operator import or_
from typing import Annotated, Any

import tyro

Commands = Mapping[str, tuple[type, Callable[[Any], int | None]]]
"""Name to (frozen dataclass of the options, function that takes it and may return a status)."""


@dataclass(frozen=True)
class _NoCommand:
    """Options of a package that has no command yet."""


def run_command(
    prog: str,
    description: str,
    commands: Commands,
    argv: Sequence[str] | None = None,
    *,
    package: str | None = None,
) -> int:
    """Run one of several commands.

    Args:
        prog: Name of the program.
        description: Help text, examples included.
        commands: The commands; with none, the help text is all there is.
        argv: Arguments without the program's name; default: those of the process.
        package: Distribution whose version ``--version`` prints; default: ``prog``.

    Returns:
        0 on success; 1 after a problem with what the user gave (``ValueError``, ``KeyError``, ``OSError`` or a missing
        extra), told in one line on stderr, or if nobody reads stdout any more; 2 if the arguments do not parse; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        sys.stdout.write(f"{prog} {version(package or prog)}\n")
        return 0
    options: Any = _NoCommand
    if commands:
        named = [Annotated[config, tyro.conf.subcommand(name)] for name, (config, _) in commands.items()]
        options = reduce(or_, named)
    elif not arguments:
        arguments = ["--help"]
    handlers = {config: handler for config, handler in commands.values()}
    # Read when torch is imported. Waiting threads shall sleep: where other programs run, spinning ones cost a factor of 5.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        try:
            config = tyro.cli(
                options, prog=prog, description=description, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
            )
            return handlers[type(config)](config) or 0
        finally:
            sys.stdout.flush()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    except BrokenPipeError:  # as in `zoo inspect ZOO | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at the exit complain
        return 1
    except (ValueError, KeyError, OSError, ImportError) as error:
        sys.stderr.write(f"{prog}: {_one_line(error)}\n")
        return 1


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    return " ".join(text.split()) or type(error).__name__
