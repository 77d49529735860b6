import importlib.util

import pytest
import slimcli
import timm
import torch
from slim_executorch.runtime import sorted_by_counting, without_sorting
from slimcli.runtimes import Conversion, Forward, find_runtime


def test_the_runtime_is_there_and_names_what_is_missing(monkeypatch):
    runtime = find_runtime("executorch")
    monkeypatch.setattr(type(runtime), "missing", lambda self: ["executorch"])
    with pytest.raises(slimcli.SlimError, match="pip install executorch"):
        runtime.require()


def model(kind):
    torch.manual_seed(0)
    dense = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=10
    )
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made = slimcli.slim(dense, 0.5, life_layer=1, dead="heir" if kind == "calibrated" else "discard").eval()
    if kind == "calibrated":
        made.redundancy, made.merge_importance, made.exact_savings = 1.0, 0.5, True
        made.life_head.extend(16, 32)
    return made


@pytest.mark.parametrize("descending", [False, True])
def test_sorting_by_counting_breaks_ties_as_a_stable_sort_does(descending):
    values = torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(0)).float()
    found = sorted_by_counting(values, True, 1, descending)
    for one, other in zip(found, values.sort(dim=1, descending=descending, stable=True), strict=True):
        assert torch.equal(one, other)


def test_a_program_of_a_model_that_plans_sorts_nothing():
    made, images = model("calibrated"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(Forward(made), (images,))
    assert [node for node in exported.graph.nodes if "sort" in str(node.target)]
    found = without_sorting(exported)
    assert not [node for node in found.graph.nodes if "sort" in str(node.target)]
    with torch.inference_mode():
        torch.testing.assert_close(found.module()(images), made(images), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")
@pytest.mark.parametrize("kind", ["discard", "calibrated"])
def test_it_gives_what_the_model_gives(kind):
    made = model(kind)
    program = find_runtime("executorch").prepare(Forward(made), Conversion(batch_size=2))
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(program.run(images), made(images), atol=1e-4, rtol=1e-3)
    program.close()
