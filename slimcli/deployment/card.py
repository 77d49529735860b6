"""The model card of an artefact, with a program that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slimcli.documents import in_markdown
from slimcli.runtimes.base import EMBEDDINGS, IMAGES, MAPS, Conversion
from slimcli.slimming import SlimModel
from slimcli.version import __version__

if TYPE_CHECKING:
    from slimcli.deployment.export import Checked

#: the lines that run an artefact on `batch` and leave `output`, by runtime
RUN = {
    "onnx": (
        ["import onnxruntime"],
        ['session = onnxruntime.InferenceSession("model.onnx")', 'output = session.run(None, {"images": batch})[0]'],
    ),
    "openvino": (
        ["import openvino"],
        [
            'model = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "%(hint)s"})',
            "output = model(batch)[0]",
        ],
    ),
    "aoti": (
        ["import torch"],
        [
            'model = torch._inductor.aoti_load_package("model.pt2")  # machine code: open only what you trust',
            "output = model(torch.from_numpy(batch)).numpy()",
        ],
    ),
}


def export_card(
    model: SlimModel, runtime: str, config: dict[str, Any], conversion: Conversion, checked: Checked, output: str
) -> str:
    """The card, in Markdown."""
    prepare = config["preprocessing"]
    size = " x ".join(str(length) for length in prepare["input_size"])
    batch = "any number of images" if conversion.batch_size is None else f"always {conversion.batch_size} images"
    lines = [
        f"# {in_markdown(config['model']['name'])}, slimmed, for {runtime}",
        "",
        f"A Vision Transformer that drops patches by {model.rule()}, exported by slim {__version__} in "
        f"{conversion.precision}; the {model.schedule.depth} blocks use "
        f"{', '.join(str(n) for n in model.patches_per_layer)} patches.",
        "",
        f"Input `{IMAGES}`: {batch} of {size}, float32, prepared as below. Output `{output}`.",
        "",
        f"Beside slim's own model in float32, on {checked}.",
        "",
    ]
    if runtime == "torch":
        lines += ["```python", "import slimcli", "", 'model = slimcli.load("path/to/this/folder")', "```", ""]
    elif runtime in RUN:
        lines += ["```python", *_program(runtime, prepare, conversion, output), "```", ""]
    if config.get("class_names"):
        names = map(in_markdown, config["class_names"])
        lines += ["## Classes", "", ", ".join(names), ""]
    return "\n".join(lines)


def _program(runtime: str, prepare: dict[str, Any], conversion: Conversion, output: str) -> list[str]:
    imports, run = RUN[runtime]
    hint = {"hint": "bf16" if conversion.precision == "bfloat16" else "f32"}
    fixed = conversion.batch_size
    more = [f"batch = numpy.repeat(batch, {fixed}, axis=0)"] if fixed not in (None, 1) else []
    chances = (
        [
            "pixels = output[0].argmax(axis=0)",
            "chances = numpy.bincount(pixels.ravel(), minlength=output.shape[1]) / pixels.size",
        ]
        if output == MAPS
        else ["chances = numpy.exp(output[0] - output[0].max())", "chances /= chances.sum()"]
    )
    printing = (
        ["print(output[0])"]
        if output == EMBEDDINGS
        else [
            *chances,
            'names = json.load(open("config.json", encoding="utf-8"))["class_names"]',
            "for number in chances.argsort()[::-1][:5]:",
            '    print(f"{100 * chances[number]:.2f} %  {names[number] if names else number}")',
        ]
    )
    return [
        *(["import json"] if output != EMBEDDINGS else []),
        "import sys",
        "",
        "import numpy",
        *imports,
        "from PIL import Image, ImageOps",
        "",
        'image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")',
        *_geometry(prepare),
        "pixels = numpy.asarray(image, dtype=numpy.float32) / 255",
        f"pixels = (pixels - numpy.float32({_plain(prepare['mean'])})) / numpy.float32({_plain(prepare['std'])})",
        "batch = numpy.ascontiguousarray(pixels.transpose(2, 0, 1)[None])",
        *more,
        *(line % hint if "%(hint)s" in line else line for line in run),
        *printing,
    ]


def _plain(values: Any) -> str:
    return str([float(value) for value in values])


def _geometry(prepare: dict[str, Any]) -> list[str]:
    """Resizing and cropping with Pillow alone, as timm and torchvision do it."""
    height, width = prepare["input_size"][1:]
    tall, wide = (int(length / (prepare["crop_pct"] or 0.875)) for length in (height, width))
    how = f"Image.Resampling.{prepare['interpolation'].upper()}"
    resize: Callable[[str], str] = lambda size: f"image = image.resize({size}, {how})"  # noqa: E731
    if prepare.get("crop_mode") == "squash":
        lines = [resize(f"({wide}, {tall})")]
    elif prepare.get("crop_mode") == "border":
        fill = tuple(round(255 * value) for value in prepare["mean"])
        return [
            f"ratio = max(image.height / {tall}, image.width / {wide})",
            resize("(round(image.width / ratio), round(image.height / ratio))"),
            f"paper = Image.new('RGB', (max(image.width, {width}), max(image.height, {height})), {fill})",
            "paper.paste(image, ((paper.width - image.width) // 2, (paper.height - image.height) // 2))",
            f"left, top = round((paper.width - {width}) / 2), round((paper.height - {height}) / 2)",
            f"image = paper.crop((left, top, left + {width}, top + {height}))",
        ]
    elif tall == wide:
        lines = [
            "shorter = min(image.size)",
            resize(f"(int({wide} * image.width / shorter), int({tall} * image.height / shorter))"),
        ]
    else:
        lines = [
            f"ratio = min(image.height / {tall}, image.width / {wide})",
            resize("(round(image.width / ratio), round(image.height / ratio))"),
        ]
    return [
        *lines,
        f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
    ]
