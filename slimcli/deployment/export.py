"""Export: a model's artefact for a runtime in a folder of its own, checked on real images before it is there."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from slimcli.deployment.card import export_card
from slimcli.device import DTYPES
from slimcli.errors import SlimError, parameter
from slimcli.files import check_writable, write_error, write_file, write_json
from slimcli.progress import Progress, no_progress
from slimcli.runtimes import Conversion, Forward, Program, Runtime, find_runtime
from slimcli.runtimes.base import EMBEDDINGS
from slimcli.runtimes.eager import TorchProgram
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import save_model, slimming_config
from slimcli.store.run_folder import CONFIG
from slimcli.store.schema import ClassNames, Preprocessing, inside, read_json, validated
from slimcli.version import __version__

FORMAT, VERSION = "slim-export", 1
#: with so many or fewer, the products of a ViT-S take no longer in int8 than all else
FEW_PATCHES = 100


@dataclass(frozen=True)
class Tolerance:
    """How far an artefact may be from slim's own model, for all images but one in `TIPPED`: the largest difference of
    its outputs, as a share of the largest output, and the mean difference as a share of the mean output; and how many
    images in a hundred must have the same prediction (for embeddings: the least mean cosine, in hundredths).
    """

    difference: float
    mean: float
    agreement: float


#: between what right exports give and what wrong ones do: docs/deploy.md has the figures
TOLERANCES = {
    "float32": Tolerance(0.001, 0.001, 99.0),
    "bfloat16": Tolerance(0.3, 0.05, 95.0),
    "int8": Tolerance(0.4, 0.16, 90.0),
}
#: of so many images one may be as far off as by a decision that rounding tipped: two patches about as good to leave
TIPPED = 20
TIPPED_DIFFERENCE = TOLERANCES["bfloat16"].difference


@dataclass(frozen=True)
class Checked:
    """An artefact beside slim's own model in float32: the images, the largest difference of outputs, as it is and as a
    share of the largest output, equal predictions in percent, or for embeddings the mean cosine in hundredths; and for
    all images but one in `TIPPED` the mean difference as a share of the mean output, and the largest as above.
    """

    images: int
    difference: float
    relative: float
    agreement: float
    classifies: bool = True
    mean: float = 0.0
    usual: float | None = None

    def __str__(self) -> str:
        same = f"{self.agreement:.1f} % of the predictions are equal"
        if not self.classifies:
            same = f"mean cosine {self.agreement / 100:.4f}"
        return (
            f"{self.images} images: {same}; the largest difference is {self.difference:.2g}, "
            f"{100 * self.relative:.2g} % of the largest output"
        )

    def problem(self, precision: str) -> str | None:
        """Why it is not good enough at a precision; None if it is."""
        allowed = TOLERANCES.get(precision, TOLERANCES["float32"])
        usual = self.relative if self.usual is None else self.usual
        largest = max(allowed.difference, TIPPED_DIFFERENCE)
        for found, most in ((usual, allowed.difference), (self.relative, largest)):
            if not found <= most:
                return f"outputs differ by {100 * found:.3g} % of the largest, and {precision} may by {100 * most:g} %"
        if not self.mean <= allowed.mean:
            return f"outputs differ by {100 * self.mean:.3g} % in the mean; {precision} may by {100 * allowed.mean:g} %"
        if not self.agreement >= allowed.agreement:
            return f"{self.agreement:.1f} % of the predictions are equal, and {precision} needs {allowed.agreement:g} %"
        return None


class Inexact(SlimError):
    """An artefact that does not give what the model gives."""


def export_model(
    model: SlimModel,
    runtime: Runtime,
    folder: Path,
    config: dict[str, Any],
    images: Iterable[Tensor],
    precision: str = "float32",
    batch_size: int | None = None,
    calibration: Sequence[Tensor] = (),
    progress: Progress = no_progress,
) -> Checked:
    """Write a model's artefact for a runtime to `folder`, with config.json and a model card, and check it.

    Args:
        folder: one that is not there yet, or empty; nothing is left in it if anything fails.
        config: `model`, `preprocessing` and where known `class_names`, as config.json of a model folder has them.
        images: batches (b, 3, H, W) of prepared images to check it on.
        batch_size: the number of images that it always takes; None: any.
        calibration: such batches that the ranges of int8 are found on.

    Raises:
        Inexact: where the outputs differ by more than `TOLERANCES` allows.
        SlimError: where the runtime cannot run the model.
    """
    require(runtime, precision, calibration)
    check_free(folder)
    own = model.to("cpu", torch.float32).eval()
    forward = Forward(own)
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:40]}."))
    try:
        progress("converting", 0, 3)
        conversion = Conversion(precision, batch_size, calibration)
        if runtime.name == "torch":
            save_model(place, own, config, DTYPES[precision], separate=True)
        else:
            runtime.write(forward, place, conversion)
            write_json(place / CONFIG, export_config(forward, runtime, place, config, conversion))
        progress("checking", 2, 3)
        program = runtime.open(place, precision)
        try:
            own_program = TorchProgram(forward, torch.float32)
            checked = check(program, own_program, images, forward.output != EMBEDDINGS, batch_size)
        finally:
            program.close()
        if problem := checked.problem(precision):
            raise Inexact(f"{folder}: not written: on {checked.images} images {problem}")
        card = export_card(own, runtime.name, config, conversion, checked, forward.output)
        write_file(place / "README.md", card.encode())
        place.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        place.rename(folder)
        progress("checking", 3, 3)
        return checked
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def small_gain(model: SlimModel, precision: str) -> str | None:
    """What to tell somebody whose model plans for so few patches that little is gained in `precision`; None if not."""
    plans = model.has_heirs or model.compares_patches
    if precision == "float32" or not (plans and model.schedule.drops_patches()) or model.num_patches > FEW_PATCHES:
        return None
    return (
        f"with {model.num_patches} patches a plan and heirs take much of the time that they save in {precision}, and a "
        "single image may take longer than in the dense model: measure it with `slim profile --runtime`; discarding "
        '(dead = "discard") and fewer drops take less'
    )


def require(runtime: Runtime, precision: str, calibration: Sequence[Tensor]) -> None:
    """`SlimError` if the runtime is not here or cannot run in the precision, or int8 comes without images."""
    runtime.require(precision)
    runtime.require_file(precision)
    if precision == "int8" and not calibration:
        raise SlimError(
            f"int8 needs images to find the ranges of activations on: name a folder of them with {parameter('data')}"
        )


def check_free(folder: Path) -> None:
    """`SlimError` if a folder cannot be written, or something is there."""
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise SlimError(f"{folder}: is there already: choose another folder, or remove it")
    check_writable(folder, "folder")


@torch.inference_mode()
def check(
    program: Program, own: Program, images: Iterable[Tensor], classifies: bool, batch_size: int | None = None
) -> Checked:
    """Run both on batches of images (b, 3, H, W); an incomplete batch is left out where its size is fixed."""
    scale, agree = 0.0, 0.0
    # of each image the largest difference, the sum of all, and the sum of outputs
    each: list[tuple[float, float, float]] = []
    for batch in images:
        if batch_size is not None and batch.shape[0] != batch_size:
            continue
        found, expected = program.run(batch), own.run(batch)
        if found.shape != expected.shape or not found.isfinite().all():
            raise Inexact(f"the artefact gives {tuple(found.shape)} with numbers that are none: {program}")
        off, output = (found - expected).abs().flatten(1), expected.abs().flatten(1)
        scale = max(scale, float(output.max()))
        each += zip(off.amax(dim=1).tolist(), off.sum(dim=1).tolist(), output.sum(dim=1).tolist(), strict=True)
        if classifies:
            # of class maps the share of equal pixels
            equal = found.argmax(dim=1) == expected.argmax(dim=1)
            agree += float(equal.reshape(len(batch), -1).double().mean(dim=1).sum())
        else:
            agree += float(torch.cosine_similarity(found, expected, dim=1).sum())
    count = len(each)
    if not count:
        raise SlimError("there are no images to check the artefact on, or too few for one batch")
    each.sort()
    largest, usual = each[-1][0], each[: count - count // TIPPED]
    scale, outputs = scale or 1.0, sum(output for *_, output in usual) or 1.0
    return Checked(
        images=count,
        difference=largest,
        relative=largest / scale,
        agreement=100 * agree / count,
        classifies=classifies,
        mean=sum(off for _, off, _ in usual) / outputs,
        usual=usual[-1][0] / scale,
    )


def export_config(
    forward: Forward, runtime: Runtime, folder: Path, config: dict[str, Any], conversion: Conversion
) -> dict[str, Any]:
    """What config.json of an artefact says."""
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "slim_version": __version__,
        "runtime": runtime.name,
        "precision": conversion.precision,
        "batch_size": conversion.batch_size,
        "output": forward.output,
        "files": {name: _digest(folder / name) for name in runtime.files},
        "preprocessing": config["preprocessing"],
        "class_names": config.get("class_names"),
        "model": {"name": config["model"]["name"]},
        "slimming": slimming_config(forward.slim),
    }


class ExportConfig(BaseModel):
    """config.json of an artefact. Files are found by the runtime's own names, never by one that stands here."""

    runtime: str
    precision: str
    batch_size: int | None = Field(default=None, gt=0)
    output: Literal["logits", "maps", "embeddings"]
    files: dict[str, str]
    preprocessing: Preprocessing
    class_names: ClassNames | None = None
    model: dict[str, Any] = {}


def is_export(folder: Path) -> bool:
    """Whether a folder holds an artefact that `slim export` wrote, for another runtime than torch.

    Raises:
        SlimError: where its config.json is damaged, or holds what no terminal should show.
    """
    if not (folder / CONFIG).is_file():
        return False
    content = read_json(inside(folder, CONFIG))
    return isinstance(content, dict) and content.get("format") == FORMAT


def open_export(folder: Path, trust_code: bool = False) -> tuple[ExportConfig, Program]:
    """The artefact in a folder, ready to run; with `trust_code` also one that holds code of its own.

    Raises:
        SlimError: if it is damaged, of another version, its runtime is not installed, or it holds code that is not
            trusted.
    """
    content = read_json(inside(folder, CONFIG))
    if content.get("format_version") != VERSION:
        raise SlimError(
            f"{folder}: an artefact of version {str(content.get('format_version'))[:20]}, written by slim "
            f"{str(content.get('slim_version'))[:20]}: this slim reads version {VERSION}: export the model again"
        )
    config = validated(folder / CONFIG, ExportConfig, content)
    runtime = find_runtime(config.runtime)
    runtime.require(config.precision)
    for name in runtime.files:
        if not inside(folder, name).is_file() or _digest(folder / name) != config.files.get(name):
            raise SlimError(f"{folder / name}: is damaged, or not what config.json was written for: export again")
    if runtime.runs_code and not trust_code:
        raise SlimError(
            f"{folder / runtime.files[0]}: is machine code, which would run here with your rights: if you exported it "
            f"yourself, or trust who did, give {parameter('trust_code')}"
        )
    return config, runtime.open(folder, config.precision)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()
