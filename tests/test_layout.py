"""Linear layers on packed weights: the same model, faster where it only predicts."""

import copy
import io

import pytest
import torch
from conftest import tiny_vit
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from slimcli import load, optimize, slim
from slimcli.backbones.counting import counted
from slimcli.layout import PackedLinear, can_pack, lay_out_for_inference, packed_bytes, rows
from slimcli.measure.clock import peak_memory_mib
from slimcli.store.model_folder import save_model

packs = pytest.mark.skipif(not can_pack(torch.float32), reason="torch is built without oneDNN here")


def packed_layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(32, 48, bias=bias).to(dtype)
    packed = lay_out_for_inference(layer)
    assert isinstance(packed, PackedLinear) and type(layer) is nn.Linear
    return packed


def plain(layer, x):
    return F.linear(x, layer.weight, layer.bias)


@torch.no_grad()
@pytest.mark.parametrize("dead", ["discard", "heir"])
def test_packing_changes_no_weight_and_no_logits(tmp_path, dead):
    model = slim(tiny_vit(depth=4), 0.5, life_layer=1, dead=dead).eval()
    model.exact_savings = True
    x = torch.randn(3, 3, 32, 32)
    logits, before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    lay_out_for_inference(model)
    torch.testing.assert_close(model(x), logits, atol=1e-5, rtol=1e-4)
    assert bool(packed_bytes(model)) == can_pack(torch.float32)
    save_model(tmp_path, model, {"model": {"name": "none", "args": {}}})
    saved = load_file(tmp_path / "model.safetensors")
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(saved[name], before[name])


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_of_a_layer_is_that_part_of_its_output(bias, dtype):
    layer = packed_layer(bias, dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    x = torch.randn(3, 9, 64).to(dtype)
    for tokens in (x[:, :5, :32], x[..., ::2], x[:0, :, :32], x[0, 0, :32], x[:1, :, :32].expand(4, -1, -1)):
        expected = plain(layer, tokens)
        torch.testing.assert_close(layer(tokens), expected, **tolerance)
        for first, last in ((0, 16), (16, 48)):
            torch.testing.assert_close(rows(layer, tokens, first, last), expected[..., first:last], **tolerance)


def test_rows_of_a_layer_that_is_not_packed():
    layer, x = nn.Linear(32, 48), torch.randn(2, 32)
    torch.testing.assert_close(rows(layer, x, 8, 20), layer(x)[:, 8:20])


@packs
@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "loaded", "cast", "given", "training"])
def test_a_changed_weight_is_packed_again(change):
    layer, x = packed_layer(), torch.randn(2, 32)
    before = layer(x)
    if change == "in place":
        layer.weight.mul_(2)
    elif change == "loaded":
        layer.load_state_dict(nn.Linear(32, 48).state_dict())
    elif change == "cast":
        layer.double()
        x = x.double()
        torch.testing.assert_close(layer(x), plain(layer, x))
        layer.weight.mul_(2)
        layer.float()
        x = x.float()
    elif change == "given":
        layer.weight = nn.Parameter(torch.randn(48, 32))
    else:
        layer.train().eval()
        layer.weight.data.mul_(2)
    assert not torch.allclose(layer(x), before)
    torch.testing.assert_close(layer(x), plain(layer, x))


@packs
def test_copies_of_a_layer_pack_their_own_weight():
    layer, x = packed_layer(), torch.randn(2, 32)
    with torch.no_grad():
        layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert packed_bytes(layer) == 48 * 32 * 4
            assert packed_bytes(other) == 0
            other.weight.mul_(2)
            torch.testing.assert_close(other(x), plain(other, x))
            torch.testing.assert_close(layer(x), plain(layer, x))


def test_a_packed_layer_learns_as_any_other():
    layer, x = packed_layer(), torch.randn(2, 32)
    with torch.no_grad():
        layer(x)
    found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(plain(layer, x).square().sum(), list(layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@torch.no_grad()
def test_what_runs_otherwise_runs_as_it_would():
    """Under autocast, compiled, counted and exported, the layer is torch's own."""
    layer, x = packed_layer(), torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not packed_bytes(layer)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), plain(layer, x))
    assert not packed_bytes(layer)
    assert counted(lambda: layer(x))[0] == 2 * 32 * 48
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), plain(layer, x))
    assert not packed_bytes(layer)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "mkldnn" not in str(traced.graph)
    torch.testing.assert_close(traced(x), plain(layer, x))


@torch.no_grad()
def test_a_torch_without_the_operators_runs_as_before(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    can_pack.cache_clear()
    try:
        assert not can_pack(torch.float32)
        layer, x = packed_layer(), torch.randn(2, 32)
        torch.testing.assert_close(layer(x), plain(layer, x), atol=0, rtol=0)
        assert not packed_bytes(layer)
    finally:
        can_pack.cache_clear()


@packs
@torch.no_grad()
def test_memory_counts_the_packed_copies():
    layer, x = packed_layer(), torch.randn(2, 32)
    before = peak_memory_mib(lambda: plain(layer, x), layer, torch.device("cpu"))
    layer(x)
    after = peak_memory_mib(lambda: plain(layer, x), layer, torch.device("cpu"))
    assert (after - before) * 2**20 == pytest.approx(48 * 32 * 4)


def test_models_are_plain_torch_until_somebody_asks_for_more(tmp_path):
    model = slim("digits_vit", 0.5)
    save_model(tmp_path, model, {"model": {"name": "digits_vit", "args": {}}})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for plain_model in (load(tmp_path), model.eval()):
            assert not any(isinstance(module, PackedLinear) for module in plain_model.modules())
            before = plain_model(x)
            fast = optimize(plain_model)
            torch.testing.assert_close(fast(x), before, atol=1e-5, rtol=1e-4)
            assert bool(packed_bytes(fast)) == can_pack(torch.float32)
            # the copy has no weights of its own, and the model stays as it was
            assert not any(isinstance(module, PackedLinear) for module in plain_model.modules())
            assert [p.data_ptr() for p in fast.parameters()] == [p.data_ptr() for p in plain_model.parameters()]
            for block in plain_model.model.blocks:
                block.mlp.fc1.weight.data.mul_(0.5)
            assert not torch.allclose(plain_model(x), before)
            torch.testing.assert_close(optimize(plain_model)(x), plain_model(x), atol=1e-5, rtol=1e-4)


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, as libraries of LoRA wrap one."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight, self.bias = base_layer.weight, base_layer.bias
        self.more = nn.Parameter(0.1 * torch.randn(base_layer.out_features, base_layer.in_features))

    def forward(self, x):
        return self.base_layer(x) + F.linear(x, self.more)


def _quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _torchao(model):
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _linears(model):
    return [
        (parent, name, layer)
        for parent in list(model.modules())
        for name, layer in list(parent.named_children())
        if type(layer) is nn.Linear
    ]


def _wrapped(model):
    for parent, name, layer in _linears(model):
        setattr(parent, name, Adapted(layer))
    return model


def _parametrized(model):
    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    for _, _, layer in _linears(model):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    return model


def _weight_normed(model):
    for _, _, layer in _linears(model):
        torch.nn.utils.weight_norm(layer)
        layer.weight_g.data.mul_(0.5)
    return model


def _hooked(model):
    for _, _, layer in _linears(model):
        layer.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


CHANGES = {
    "quantize_dynamic": _quantized,
    "torchao": _torchao,
    "adapters": _wrapped,
    "parametrized": _parametrized,
    "weight norm": _weight_normed,
    "hooks": _hooked,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dead", ["discard", "heir"])
@pytest.mark.parametrize("change", CHANGES)
def test_linear_layers_that_are_more_than_their_weight_are_called(change, dead):
    """Whatever somebody made of a model's linear layers counts, wherever slim takes a part of one."""
    model = slim(tiny_vit(), 0.5, life_layer=1, dead=dead).eval()
    model.life_head.extend(16, 16)
    for parameter in model.life_head.context.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.exact_savings = True
    if change != "quantize_dynamic":
        model.redundancy = 1.0
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
    changed = CHANGES[change](copy.deepcopy(model))
    with torch.no_grad():
        found = changed(x)
        assert found.isfinite().all() and not torch.equal(found, before)
        torch.testing.assert_close(optimize(changed)(x), found, atol=1e-4, rtol=1e-3)
        # the parts that slim takes are those of the whole blocks: what it leaves out, nothing reads
        changed.exact_savings = False
        torch.testing.assert_close(changed(x), found, atol=0.05 if "quant" in change else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("dead", ["discard", "heir"])
@pytest.mark.parametrize("exact", [False, True])
def test_hooks_that_only_look_change_nothing(dead, exact):
    model = slim(tiny_vit(), 0.5, life_layer=1, dead=dead).eval()
    model.exact_savings = exact
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        for name in ("", "attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "norm1"):
            seen: list[int] = []
            handles = [
                block.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
                for block in model.model.blocks
            ]
            torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
            assert len(seen) >= len(handles), f"a hook on {name or 'the block'} did not fire"
            for handle in handles:
                handle.remove()


def test_hooks_that_change_something_have_their_effect():
    model = slim(tiny_vit(), 0.5, life_layer=1, dead="heir").eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        for name in ("", "attn", "mlp"):
            # in the third block heirs take over
            part = model.model.blocks[2].get_submodule(name)
            handle = part.register_forward_hook(lambda module, args, output: output * 0)
            assert not torch.allclose(model(x), before), name
            handle.remove()
