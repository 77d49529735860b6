"""The Python blocks of README.md run, on small models with random weights."""

import re
from pathlib import Path

import torch
import transformers
from test_tower_transformers import IMAGE, clip, llava, question

from slim_transformers.build import small_models

README = Path(__file__).parent.parent / "README.md"
MODELS = {
    "Dinov2ForImageClassification": small_models()["Dinov2ForImageClassification"],
    "AutoModel": small_models()["Dinov2Model"],
    "CLIPModel": clip,
    "LlavaForConditionalGeneration": llava,
}


def test_the_python_blocks_of_the_readme_run(monkeypatch):
    for name, build in MODELS.items():
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *_args, build=build, **_options: build()
        )
    names = {"images": torch.randn(2, 3, 32, 32), "inputs": question()}
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["early"].shape == (2, 32, 4, 4)
    assert (names["fewer"]["input_ids"] == IMAGE).sum() == names["living"].numel() < 32
