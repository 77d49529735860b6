"""The `slim` command: a file a subcommand, each imported only when it runs."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import logging
import os
import sys
from typing import Any

import click

from slimcli.documents import visible
from slimcli.errors import Interrupted, SlimError
from slimcli.version import __version__

# torch's profiler and allocator otherwise write lines of their own over ours
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# a home that cannot be written to makes matplotlib advise at length; it works all the same
logging.getLogger("matplotlib").setLevel(logging.ERROR)

COMMANDS = {
    "calibrate": "A working slimmed model before any training, in about two minutes.",
    "compare": "Life regression beside other methods: one table, one plot.",
    "eval": "Accuracy, cost and speed, dense against slimmed, on real images.",
    "export": "A model for ONNX Runtime, OpenVINO, AOTInductor or torch, checked.",
    "paper": "The paper's tables and figure 4, measured on your data.",
    "plugins": "What is installed, and which models each plugin serves.",
    "predict": "Classes, or embeddings, of images: files, folders, names on stdin.",
    "profile": "Cost, speed and memory of a model, without any data.",
    "prune": "Bake a schedule into a folder that is ready to deploy.",
    "push": "Publish a model folder on the Hugging Face hub.",
    "recipes": "List the built-in recipes, copy one out, check one.",
    "report": "One HTML page of a run: tables, curves, pictures, commands.",
    "show": "Pictures of the life of every patch over the image.",
    "train": "Train a model by a recipe.",
}


class SlimGroup(click.Group):
    """Loads a subcommand when it is asked for, and turns errors into one line and an exit code.

    0: done. 1: failed or interrupted. 2: something the user can put right.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["slim.words"] = list(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(_added())]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return _added().get(name)
        command: click.Command = importlib.import_module(f"slimcli.cli.{name}").command
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            # a name that the terminal's encoding does not have is printed with escapes
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1, cutoff=0.5)
            ctx.fail(f"No such command {name!r}{f': did you mean `slim {near[0]}`?' if near else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command for its help line
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
        added = _added()
        if added:
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(name, added[name].get_short_help_str(80)) for name in sorted(added)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            # the reader went away, as `slim ... | head` does: nothing more to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except Exception as error:
            if ctx.meta.get("slim.debug"):
                raise
            message, code = _explain(error, _options(self, ctx))
            click.echo(visible(message, lines=True), err=True)
            ctx.exit(code)


def _added() -> dict[str, click.Command]:
    """The commands of installed plugins, without those that bear the name of one of slim's own."""
    from slimcli.plugins import commands

    return {name: command for name, command in commands().items() if name not in COMMANDS}


def _options(command: click.Command, ctx: click.Context) -> dict[str, str]:
    """How the command that is running spells its parameters: `{"keep_rates": "--keep-rate"}`.

    The name in an option itself, `keep_rate`, means it too: what takes one and several may be called by either.
    """
    for word in ctx.meta.get("slim.words", ()):
        if isinstance(command, click.Group):
            command = command.get_command(ctx, word) or command
    options = [option for option in command.params if isinstance(option, click.Option)]
    spelled = {max(o.opts, key=len).lstrip("-").replace("-", "_"): o.opts[0] for o in options}
    return spelled | {option.name: option.opts[0] for option in options}


def _explain(error: Exception, options: dict[str, str]) -> tuple[str, int]:
    if isinstance(error, click.UsageError):
        name = error.ctx.command_path if error.ctx else "slim"
        return f"Error: {error.format_message()} (see `{name} --help`)", 2
    if isinstance(error, SlimError):
        return f"Error: {error.spelled(options)}", 2
    if isinstance(error, Interrupted):
        return f"Stopped; everything is saved. Go on with: slim train --resume {error}", 1
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"Error: {error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}", 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Error: no space left on the disk, or none for temporary files: free some and run again", 2
    full = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or full:
        return f"Error: out of memory ({error}): try a smaller --batch-size", 1
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"Error: {type(error).__name__}: {first} (this should not happen: --debug shows where)", 1


def _debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["slim.debug"] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show the traceback of an error."
)


@click.group(cls=SlimGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="slim")
@debug_option
def main() -> None:
    """Make a Vision Transformer faster by dropping image patches it no longer needs.

    \b
    First steps:
      slim train quickstart            slim a small model of digits, about a minute
      slim eval --keep-rate 0.7        accuracy and speed, dense against slimmed
      slim profile deit_small_patch16_224 --keep-rate 1.0,0.9,0.8,0.7
    """
