import importlib.util

import pytest
import slimcli
import timm
import torch
from slimcli.runtimes import Conversion, Forward, find_runtime


def test_the_runtime_is_there_and_names_what_is_missing(monkeypatch):
    runtime = find_runtime("executorch")
    monkeypatch.setattr(type(runtime), "missing", lambda self: ["executorch"])
    with pytest.raises(slimcli.SlimError, match="pip install executorch"):
        runtime.require()


@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")
def test_it_gives_what_the_model_gives():
    torch.manual_seed(0)
    dense = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=10
    )
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = slimcli.slim(dense, 0.5, life_layer=1).eval()
    program = find_runtime("executorch").prepare(Forward(model), Conversion(batch_size=2))
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(program.run(images), model(images), atol=1e-4, rtol=1e-3)
    program.close()
