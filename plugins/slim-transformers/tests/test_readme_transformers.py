"""The Python blocks of README.md run, on a small model with random weights."""

import re
from pathlib import Path

import torch
import transformers

from slim_transformers.build import small_models

README = Path(__file__).parent.parent / "README.md"


def test_the_python_blocks_of_the_readme_run(monkeypatch):
    kind = transformers.Dinov2ForImageClassification
    monkeypatch.setattr(kind, "from_pretrained", lambda *_args, **_options: small_models()[kind.__name__]())
    names = {"images": torch.randn(2, 3, 32, 32)}
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
