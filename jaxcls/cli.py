"""The command line: it picks the subcommand, and turns errors into one line and an exit code."""

import os
import sys
import warnings
from collections.abc import Sequence

import tyro

import jaxcls
from jaxcls.commands.annotate import Annotate
from jaxcls.commands.augment import Augment
from jaxcls.commands.base import FAILED, INTERRUPTED, WRONG_USAGE
from jaxcls.commands.gather import Gather
from jaxcls.commands.info import Info
from jaxcls.commands.pack import Pack
from jaxcls.commands.review import Review
from jaxcls.commands.scoring import Evaluate, Export, Features, Predict
from jaxcls.commands.service import Delete, Deploy, Docker, List, Loadtest, Score, Serve
from jaxcls.commands.thresholds import Thresholds
from jaxcls.commands.training import Quickstart, Svm, Train
from jaxcls.errors import JaxclsError, UsageError
from jaxcls.storage import Storage

COMMANDS = (
    Quickstart, Info, Gather, Annotate, Augment, Pack, Train, Svm, Evaluate, Review, Thresholds, Predict,
    Features, Export, Serve, Deploy, List, Delete, Score, Loadtest, Docker,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Training that is asked to end by SIGTERM exits with 143.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    warnings.formatwarning = _format_warning
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            {kind.__name__.lower(): kind for kind in COMMANDS},
            prog="jaxcls",
            description=f"jaxcls {jaxcls.__version__}: {jaxcls.__doc__.partition(chr(10))[0]}",
            args=arguments,
        )
        storage = Storage.default()
        storage.clean()
        # Libraries that keep files of their own; the user's variables go before.
        for variable, folder in (("MPLCONFIGDIR", "matplotlib"), ("HF_XET_CACHE", "xet")):
            os.environ.setdefault(variable, str(storage.persistent / folder))
        if command.uses_jax:
            from jaxcls.parallel import use_compilation_cache

            use_compilation_cache(storage.persistent / "compiled")
        return command.run()
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Point the stream elsewhere, or its flush at exit fails too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (JaxclsError, OSError) as error:
        if "--debug" in arguments:
            raise
        message = str(error)
        if isinstance(error, OSError) and error.filename:  # those of object stores have none
            message = f"{error.filename}: {error.strerror}"
        print(f"jaxcls: {message}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        print("jaxcls: interrupted", file=sys.stderr)
        return INTERRUPTED


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Without the line of code that warned, which tells a user nothing."""
    return f"jaxcls: {message}\n"


if __name__ == "__main__":
    sys.exit(main())
