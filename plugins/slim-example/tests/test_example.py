"""The model drops patches, and does all that slim asks of a backbone."""

import slimcli
import torch

from slim_example.model import TinyViT

test_conformance = slimcli.conformance_tests(TinyViT)


def test_half_of_the_patches_leave():
    model = slimcli.slim(TinyViT(), keep_rate=0.5, life_layer=1, drop_layers=[2])
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 10)
    assert model.patches_per_layer == (16, 16, 8, 8)
    assert model.life.shape == (2, 16)
