"""The command line: the verbs in their groups, and where an exception becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from evomerge import __version__
from evomerge._escaping import one_line
from evomerge._redaction import ScrubbedFormatter, scrub
from evomerge.cli import analysis, control, doctor, fetch, init, pages, pictures, run, ship
from evomerge.cli.output import print_in_any_locale, put, tell
from evomerge.cli.usage_errors import usage_line
from evomerge.errors import ConfigError, EvomergeError, unwritable
from evomerge.launch.threads import set_thread_defaults

_verbose = False
_PLACES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
"""Errors of a place that the user chose, which are no bugs."""


class GroupedCommands(TyperGroup):
    """Lists the verbs under the heading of their group, in plain text.

    typer draws groups with rich, whose import alone takes longer than everything else that `--help` does.
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes one section for each group.

        Args:
            ctx: The context of click.
            formatter: The help text so far, which the sections are added to.
        """
        groups: dict[str, list[tuple[str, Any]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            groups.setdefault(command.rich_help_panel, []).append((name, command))
        width = formatter.width - 6 - max(len(name) for rows in groups.values() for name, _ in rows)
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in rows])


app = typer.Typer(
    name="evomerge",
    help="Evolutionary search for merge recipes of language models.",
    cls=GroupedCommands,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
_GROUPS = {
    "Plan": (init.init, init.schema, analysis.plan, fetch.fetch, doctor.doctor),
    "Search": (run.run, run.resume, control.stop),
    "Inspect": (
        control.status,
        analysis.show,
        analysis.compare,
        analysis.sensitivity,
        pictures.plot,
        pages.report,
        pages.dashboard,
    ),
    "Export": (ship.export, ship.merge),
}
for _group, _verbs in _GROUPS.items():
    for _verb in _verbs:
        app.command(rich_help_panel=_group)(_verb)


def _show_version(requested: bool) -> None:
    if requested:
        put(f"evomerge {__version__}")
        raise typer.Exit


Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks and log lines.")]
Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
]


@app.callback()
def _global_options(verbose: Verbose = False, version: Version = False) -> None:
    global _verbose
    _verbose = verbose
    if verbose:
        import logging

        handler = logging.StreamHandler()
        handler.setFormatter(ScrubbedFormatter("%(asctime)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])


def main() -> None:
    """Runs the command line; every error is one line on standard error and an exit code.

    Raises:
        SystemExit: With the exit code of the error's class, 130 after Ctrl-C, 1 for an unforeseen exception.
    """
    set_thread_defaults()
    print_in_any_locale()
    code: Any = 0
    try:
        code = app(standalone_mode=False)
    except BrokenPipeError:  # who read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except EvomergeError as error:
        if _verbose:
            raise
        line = f"error[{error.code}] {error}" if error.exit_code else str(error)
        _exit(line, error.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's, of whichever click it brings
            _refuse_usage(error)
        if _verbose:
            raise
        if isinstance(error, OSError) and error.errno in _PLACES:
            explained = unwritable(error.filename or "a file", error)
            _exit(f"error[{explained.code}] {explained}", explained.exit_code)
        _exit(f"error[E000] {type(error).__name__}: {error} (a bug; -v shows where)", 1)

    if isinstance(code, int) and code:
        raise SystemExit(code)


def _refuse_usage(error: Any) -> None:
    """Ends with 2 and one line; with the help where no verb is given."""
    if type(error).__name__ == "NoArgsIsHelpError":
        tell(error.format_message())
        raise SystemExit(2) from None
    _exit(f"error[{ConfigError.code}] {usage_line(error)}", ConfigError.exit_code)


def _exit(line: str, code: int) -> None:
    tell(one_line(scrub(line)))
    raise SystemExit(code) from None
