"""The Python blocks of README.md run, on a small model with random weights."""

import re
from pathlib import Path

import open_clip
import torch

from slim_openclip.tower import SMALL

README = Path(__file__).parent.parent / "README.md"


def test_the_python_blocks_of_the_readme_run(monkeypatch):
    small = open_clip.CLIP(**SMALL).eval()
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_args, **_options: (small, None, None))
    names = {"images": torch.randn(2, 3, 32, 32)}
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
