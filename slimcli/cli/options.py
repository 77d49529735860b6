"""Options that several commands share."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from slimcli.cli import debug_option
from slimcli.errors import SlimError
from slimcli.schedule import check_keep_rate

if TYPE_CHECKING:
    from slimcli.runtimes.measuring import Place

F = TypeVar("F", bound=Callable[..., Any])


class KeepRates(click.ParamType):  # type: ignore[type-arg]
    """One keep rate or several, separated by commas."""

    name = "RATE[,RATE...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        rates = []
        for part in str(value).split(","):
            try:
                rates.append(check_keep_rate(float(part)))
            except ValueError:
                raise SlimError(
                    f"--keep-rate {value}: {part.strip()!r} is not a number: expected one above 0 and at most 1, "
                    "such as 0.7, or several separated by commas"
                ) from None
            except SlimError as error:
                raise SlimError(f"--keep-rate {value}: {error}") from None
        return rates


class KeepRate(KeepRates):
    """One keep rate."""

    name = "RATE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, float):
            return value
        rates = super().convert(value, param, ctx)
        if len(rates) > 1:
            raise SlimError(f"--keep-rate {value}: takes one keep rate here")
        return rates[0]


class Seeds(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers separated by commas, each once."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if not isinstance(value, str):
            return list(value)
        found = words(value)
        if not found or not all(word.isascii() and word.isdigit() for word in found):
            raise SlimError(f"--seeds {value}: expected whole numbers separated by commas, such as 0,1,2")
        return list(dict.fromkeys(map(int, found)))


def words(text: str | None) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def command_line() -> str:
    """The command that is running, as it can be run again."""
    return shlex.join(["slim", *click.get_current_context().meta.get("slim.words", [])])


def keep_rate_option(help_text: str) -> Callable[[F], F]:
    """--keep-rate, one or several."""
    return click.option("--keep-rate", "keep_rates", type=KeepRates(), help=help_text)


def one_keep_rate_option(help_text: str) -> Callable[[F], F]:
    """--keep-rate, one."""
    return click.option("--keep-rate", "keep_rate", type=KeepRate(), help=help_text)


def limit_option(help_text: str, **more: Any) -> Callable[[F], F]:
    """--limit, a number of images."""
    return click.option("--limit", type=click.IntRange(min=1), help=help_text, **more)


def common_options(command: F) -> F:
    """--device, --precision, --json and --debug."""
    for option in reversed(
        (
            click.option(
                "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"])
            ),
            click.option(
                "--precision",
                type=click.Choice(["float32", "bfloat16", "float16"]),
                help="What the arithmetic runs in.  [default: the recipe's, or float32]",
            ),
            json_option,
            debug_option,
        )
    ):
        command = option(command)
    return command


def target_options(command: F) -> F:
    """--weights and --model, beside a TARGET."""
    for option in (
        click.option(
            "--model", metavar="NAME", help="The model that weights are of, where no TARGET says it: a model's name."
        ),
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Weights in place of the target's: .safetensors, or a checkpoint of torch's.",
        ),
    ):
        command = option(command)
    return command


def goal_options(command: F) -> F:
    """--target-flops, --target-speedup, and the --runtime in which that is measured."""
    for option in (
        click.option(
            "--runtime",
            metavar="NAME[:PRECISION]",
            help="Where that is measured: onnx:int8, openvino, ...  [default: torch; on CUDA cuda-graph]",
        ),
        click.option("--target-speedup", type=float, metavar="X", help="Speed-up to reach, measured on this device."),
        click.option("--target-flops", type=float, metavar="G", help="Cost to reach, in G multiply-adds an image."),
    ):
        command = option(command)
    return command


def refuse_given(reason: str, *names: str) -> None:
    """`SlimError` with `reason` if one of these parameters stands on the command line."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise SlimError(f"{parameter.opts[0]} has no effect {reason}")


def find_runtimes(runtimes: str | None, asked: dict[str, Any]) -> list[Place]:
    """The runtimes that --runtime names, on the device that is then set in `asked`; none where it is not given."""
    if runtimes is None:
        return []
    from slimcli.runtimes.measuring import find_places

    refuse_given("with --runtime: it takes NAME:PRECISION", "precision")
    refuse_given("with --runtime", "against", "per_layer", "operators", "streams")
    found = find_places(words(runtimes), asked["device"])
    if not found:
        raise SlimError("--runtime: names no runtime: expected NAME[:PRECISION], such as onnx:int8")
    asked["device"] = found[0].device.type
    return found


def repeat_options(command: F) -> F:
    """--seeds and --test, of a comparison."""
    for option in (
        click.option("--test", metavar="SPLIT", help="Folder or .tar of the data to measure on.  [default: val_split]"),
        click.option("--seeds", type=Seeds(), default=(), help="Train every method once with each of these."),
    ):
        command = option(command)
    return command


def _set_threads(context: click.Context, _parameter: click.Parameter, count: int | None) -> None:
    if count is not None:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(count)
        context.call_on_close(lambda: torch.set_num_threads(before))


threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    expose_value=False,
    callback=_set_threads,
    help="Threads to compute with on a CPU.  [default: as OMP_NUM_THREADS says, or one a core]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; progress on stderr.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of the recipe; may be repeated."
)
data_option = click.option(
    "--data", metavar="PATH", help="Folder or .tar of images in class folders, or digits.  [default: the target's own]"
)
class_map_option = click.option(
    "--class-map",
    metavar="FILE|A=B,...",
    help="The model's class for classes of the data that have other names: puppy=dog, or a .json, .toml or .csv file.",
)
split_option = click.option("--split", help="Folder or .tar inside --data.  [default: the recipe's val_split]")
purpose_option = click.option(
    "--for",
    "purpose",
    type=click.Choice(["class", "patches", "both"]),
    default="class",
    show_default=True,
    help="What is to stay as the dense model has it: its output, the features of all patches, or both.",
)
dead_option = click.option(
    "--dead",
    type=click.Choice(["discard", "heir"]),
    help="What becomes of a patch whose life is over: gone, or added to the one most like it.  [default: the target's]",
)
batch_size_option = click.option("--batch-size", type=click.IntRange(min=1), help="Images in a batch.")
runtime_option = click.option(
    "--runtime",
    "runtimes",
    metavar="NAME[:PRECISION],...",
    help="Measure in these runtimes: torch, compile and, on CUDA, cuda-graph; on the CPU aoti, onnx, onnx:int8, "
    "openvino, ...; all: every one that is installed.",
)
