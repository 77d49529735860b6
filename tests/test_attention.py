"""Attention with a bias per key: every kernel gives what the plain formula gives, values and gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import document
from torch import Tensor
from torch.nn import functional as F

from slimcli import attention
from slimcli.attention import TrainingAttention, attend, biased_attention, choose, running
from slimcli.attention.kernels import aligned
from slimcli.errors import SlimError

SKIP = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, SKIP])
#: relative to the largest value or gradient
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def inputs(device: str, dtype: torch.dtype, tokens: int = 33, heads: int = 2, images: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (images, heads, tokens, 16)
    qkv = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    # as log w of soft weights are: from 0 far down
    bias = -8 * torch.rand(images, tokens, generator=generator) ** 2
    return [*qkv, bias.to(device).requires_grad_()]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    scale = expected.float().abs().max()
    return bool((found.float() - expected.float()).abs().max() <= TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["mask", "channel", "auto", "flex"])
def test_values_and_gradients_equal_the_plain_formula_in_float32(device, dtype, kernel):
    if kernel == "flex" and device == "cpu":
        pytest.skip("FlexAttention has no gradients on a CPU")
    given = inputs(device, dtype)
    exact = [tensor.detach().float().requires_grad_() for tensor in given]
    found, expected = attend(*given, kernel=kernel), attend(*exact, kernel="reference")
    assert found.dtype == dtype
    assert close(found, expected, dtype)
    for mine, theirs in zip(
        torch.autograd.grad(found.float().square().sum(), given),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    ):
        assert close(mine, theirs, dtype)


def test_the_reference_is_softmax_with_weighted_exponentials():
    query, key, value, bias = (tensor.detach() for tensor in inputs("cpu", torch.float32))
    weighted = (query @ key.transpose(-2, -1) / 4).exp() * bias.exp()[:, None, None, :]
    expected = weighted / weighted.sum(dim=-1, keepdim=True) @ value
    torch.testing.assert_close(attend(query, key, value, bias, kernel="reference"), expected)


@pytest.mark.parametrize("kernel", ["reference", "mask", "channel"])
def test_a_bias_of_minus_infinity_takes_a_key_out(kernel):
    query, key, value, _ = (tensor.detach() for tensor in inputs("cpu", torch.float32))
    bias = torch.zeros(3, 33)
    bias[:, 20:] = float("-inf")
    expected = F.scaled_dot_product_attention(query, key[:, :, :20], value[:, :, :20])
    torch.testing.assert_close(attend(query, key, value, bias, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", ["reference", "mask", "channel"])
def test_keys_that_are_all_nearly_dead_keep_their_proportions(kernel):
    query, key, value, bias = (tensor.detach() for tensor in inputs("cpu", torch.float32))
    torch.testing.assert_close(
        attend(query, key, value, bias - 3e4, kernel=kernel),
        attend(query, key, value, bias),
        atol=2e-3,
        rtol=0,
    )


def test_the_channel_keeps_in_bfloat16_what_rounding_the_bias_would_lose():
    query, key, value, _ = (tensor.detach() for tensor in inputs("cpu", torch.bfloat16))
    # equal queries and keys: the bias alone decides, and these two round to the same bfloat16
    query, key = torch.zeros_like(query), torch.zeros_like(key)
    bias = torch.full((3, 33), -6.0)
    bias[:, 0] = -6.0 + 0.01
    value = F.one_hot(torch.zeros(3, 2, 33, dtype=torch.long), 16).to(torch.bfloat16)
    value[:, :, 1:] = 0
    seen = attend(query.float(), key.float(), value.float(), bias, kernel="reference")[0, 0, 0, 0]
    channel = attend(query, key, value, bias, kernel="channel")[0, 0, 0, 0].float()
    assert abs(float(channel / seen) - 1) < 5e-3


@pytest.mark.parametrize("kernel", ["reference", "mask"])
def test_survivors_keep_their_own_part_of_a_bias_per_pair(kernel):
    query, key, value, bias = (tensor.detach() for tensor in inputs("cpu", torch.float32))
    pairs = torch.randn(1, 2, 33, 33)
    places = torch.stack([torch.randperm(33)[:12] for _ in range(3)])
    found = attend(
        *(torch.stack([x[i][:, places[i]] for i in range(3)]) for x in (query, key, value)),
        key_bias=torch.stack([bias[i][places[i]] for i in range(3)]),
        pair_bias=pairs,
        places=places,
        kernel=kernel,
    )
    for i in range(3):
        kept = places[i]
        logits = query[i][:, kept] @ key[i][:, kept].transpose(-2, -1) / 4 + bias[i][kept]
        expected = (logits + pairs[0][:, kept][:, :, kept]).softmax(-1) @ value[i][:, kept]
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-4)


def test_flex_reads_the_same_biases(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    # compiling takes half a minute on a CPU; what is tested is the score_mod
    monkeypatch.setattr(attention.kernels, "_compiled_flex", lambda: flex_attention)
    query, key, value, bias = (tensor.detach() for tensor in inputs("cpu", torch.float32, tokens=12))
    pairs, places = torch.randn(1, 2, 33, 33), torch.stack([torch.randperm(33)[:12] for _ in range(3)])
    for extra in ({}, {"pair_bias": pairs, "places": places}, {"pair_bias": pairs, "places": places[:1]}):
        found = attend(query, key, value, bias, kernel="flex", **extra)
        torch.testing.assert_close(found, attend(query, key, value, bias, kernel="reference", **extra))


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().size() // tensor.element_size())
        return out


@pytest.mark.parametrize("case", ["mask", "channel", "pairs"])
def test_no_bias_of_every_image_head_and_pair_is_made(case):
    query, key, value, bias = (t.detach() for t in inputs("cpu", torch.float32, tokens=200, heads=6, images=4))
    extra = {}
    if case == "pairs":
        places = torch.stack([torch.randperm(200) for _ in range(4)])
        extra = {"pair_bias": torch.randn(1, 6, 200, 200), "places": places}
    watch = _LargestTensor()
    with watch:
        attend(query, key, value, bias, kernel="mask" if case == "pairs" else case, **extra)
    assert watch.largest < 4 * 6 * 200 * 200 / 3


def test_the_choice_follows_device_shape_and_gradient(monkeypatch):
    monkeypatch.setattr("slimcli.attention.choice.TILES", False)
    assert choose("cpu", 65, 64, learns=True) == "reference"
    assert choose("cpu", 785, 64, learns=True) == "channel"
    assert choose("cuda", 65, 64, learns=True) == "channel"
    assert choose("cuda", 785, 64, learns=False) == "mask"
    assert choose("cuda", 785, 256, learns=True) == "mask"
    assert choose("cuda", 785, 64, learns=False, pairs_per_image=True) == "flex"
    assert choose("cpu", 785, 64, learns=False, pairs_per_image=True) == "mask"
    assert choose("cpu", 101, 64, learns=False, bfloat16=True, trains=True) == "reference"
    assert choose("cpu", 101, 64, learns=False, trains=True) == "mask"
    assert choose("cpu", 785, 64, learns=False, bfloat16=True, trains=True) == "mask"
    assert choose("cuda", 101, 64, learns=False, bfloat16=True, trains=True) == "mask"
    assert choose("cpu", 65, 64, learns=False, bfloat16=True, images=8) == "reference"
    assert choose("cpu", 65, 64, learns=False, bfloat16=True, images=1) == "mask"
    assert choose("cpu", 101, 64, learns=False, bfloat16=True, images=8) == "mask"
    assert choose("cpu", 65, 64, learns=False, images=8) == "mask"
    # a processor that multiplies in tiles does so in the fused kernel, and its backward pass is slow there too
    monkeypatch.setattr("slimcli.attention.choice.TILES", True)
    assert choose("cpu", 65, 64, learns=False, bfloat16=True, images=8) == "mask"
    assert choose("cpu", 101, 64, learns=False, bfloat16=True, trains=True) == "reference"


@pytest.mark.parametrize(
    ("dtype", "tokens", "fused"), [(torch.bfloat16, 65, False), (torch.bfloat16, 200, True), (torch.float32, 65, True)]
)
def test_training_in_bfloat16_leaves_the_slow_backward_pass_of_the_fused_kernel(dtype, tokens, fused):
    query, key, value = (t.detach().requires_grad_() for t in inputs("cpu", dtype, tokens=tokens)[:3])
    expected = F.scaled_dot_product_attention(query, key, value)
    causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with TrainingAttention():
        found = F.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, is_causal=True), causal)
        # nothing to go back through: the fused kernel
        with torch.no_grad():
            torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value), expected, atol=0, rtol=0)
    assert ("FlashAttention" in type(found.grad_fn).__name__) == fused
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)]
    torch.testing.assert_close(*gradients, atol=5e-2, rtol=5e-2)


def test_what_runs_is_named_with_torchs_backend():
    query = torch.randn(2, 3, 300, 16)
    assert running(query, query, learns=False) == attention.Running("mask", "flash")
    # a mask that needs a gradient leaves the fused kernel, a channel does not
    assert running(query, query, learns=True, kernel="mask") == attention.Running("mask", "math")
    assert running(query, query, learns=True) == attention.Running("channel", "flash")


def test_attention_inside_other_peoples_modules_gets_the_bias():
    query, key, value, bias = (tensor.detach() for tensor in inputs("cpu", torch.float32))
    with biased_attention(bias):
        found = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, attend(query, key, value, bias))
    module = torch.nn.MultiheadAttention(32, 2, batch_first=True).eval()
    tokens, bias = torch.randn(3, 33, 32), bias.clone()
    bias[:, 30:] = float("-inf")
    for weights in (False, True):
        with biased_attention(bias):
            found = module(tokens, tokens, tokens, need_weights=weights)[0]
        expected = module(tokens, tokens, tokens, key_padding_mask=bias)[0]
        torch.testing.assert_close(found, expected)


def test_a_bias_that_nothing_takes_is_an_error_that_says_what_to_write():
    query = torch.randn(1, 1, 4, 8)
    with pytest.raises(SlimError, match="override masked_block"), biased_attention(torch.zeros(1, 4)):
        (query @ query.transpose(-2, -1)).softmax(-1)


def test_profile_says_which_kernel_runs_and_the_recipe_decides(slim, tiny_recipe):
    words = ("profile", tiny_recipe, "--keep-rate", "0.5", "--seconds", "0", "--batch-size", "2", "--json")
    assert document(slim(*words))["attention"] == {"inference": "mask (flash)", "training": "reference"}
    chosen = document(slim(*words, "--set", "slimming.attention=channel"))["attention"]
    assert chosen["training"] == "channel (flash)"
    gone = document(slim(*words, "--dead", "discard"))["attention"]
    assert gone["inference"] == "unmasked (flash)"
    refused = slim(*words, "--set", "slimming.attention=fast")
    assert "expected 'auto', 'reference', 'mask', 'channel' or 'flex'" in refused.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_of_a_mask_for_a_gpu_begins_at_16_bytes(dtype):
    all_blocks = torch.randn(3, 5, 13, dtype=dtype)
    for part in (all_blocks[:, 2, :11], all_blocks[:, 0, 1:9], all_blocks[0, :, :8]):
        mask = part[:, None, None]
        found = aligned(mask)
        assert torch.equal(found, mask)
        assert found.data_ptr() % 16 == 0 and found.stride(0) * found.element_size() % 16 == 0
    whole = torch.randn(2, 1, 4, 16, dtype=dtype)
    assert aligned(whole) is whole
