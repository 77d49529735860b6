"""The methods that life regression is compared with, each against a slow, obvious version of its published rule."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import document, families, tiny_vit
from published import attended, images, made
from torch.nn import functional as F

import slimcli
from slimcli import LifeModel, Method, SlimError, SlimModel, plugins
from slimcli.backbones import likeness
from slimcli.backbones.counting import counted
from slimcli.methods import dynamicvit
from slimcli.methods.base import facts
from slimcli.methods.merging import merges
from slimcli.store.model_folder import save_model

EVIT = ("evit", "evit-nofuse")
MERGING = ("tome", "pitome", "tofu", "atc", "atc-complete")
NAMES = (*EVIT, "dynamicvit", *MERGING, "diffrate", "evo-vit", "a-vit", "ia-red2", "random")
#: one of each kind, for what takes long
KINDS = ("evit", "dynamicvit", "tome", "atc", "diffrate", "evo-vit", "a-vit", "ia-red2", "random")
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}


slim = slimcli.slim


# The published rules, image by image and token by token.


def published_evit(model, image, rate, layers, fuse):
    dense, prefix = model.model, model.backbone.num_prefix_tokens
    x = model.backbone.embed(image[None])[0][0]
    for layer, block in enumerate(dense.blocks, 1):
        x, maps, _ = attended(block, x)
        if layer in layers:
            n = len(x) - prefix
            paid = [sum(float(each[0, prefix + j]) for each in maps) / len(maps) for j in range(n)]
            best = sorted(range(n), key=lambda j: -paid[j])
            stay = math.ceil(rate * n - 1e-9)
            rows = [*x[:prefix], *(x[prefix + j] for j in best[:stay])]
            if fuse and stay < n:
                rows.append(sum(paid[j] * x[prefix + j] for j in best[stay:]))
            x = torch.stack(rows)
        x = x + block.mlp(block.norm2(x))
    return model.backbone.head(x[None])[0]


def published_tome(model, image, fewer):
    prefix = model.backbone.num_prefix_tokens
    x = list(model.backbone.embed(image[None])[0][0])
    size = [1.0] * len(x)
    for block, r in zip(model.model.blocks, fewer, strict=True):
        y, _, key = attended(block, torch.stack(x), size if max(size) > 1 else None)
        x = list(y)
        if r:
            metric = [F.normalize(sum(each[i] for each in key) / len(key), dim=0) for i in range(len(x))]
            even = [i for i in range(prefix, len(x)) if i % 2 == 0]
            odd = [i for i in range(prefix, len(x)) if i % 2 == 1]
            partner = {i: max(odd, key=lambda j, i=i: float(metric[i] @ metric[j])) for i in even}
            chosen = sorted(even, key=lambda i: -float(metric[i] @ metric[partner[i]]))
            gone, rest = chosen[:r], chosen[r:]
            totals = {j: size[j] * x[j] for j in odd}
            sizes = {j: size[j] for j in odd}
            for i in gone:
                totals[partner[i]] = totals[partner[i]] + size[i] * x[i]
                sizes[partner[i]] += size[i]
            rest = sorted(rest) if prefix else rest
            x = [*x[:prefix], *(x[i] for i in rest), *(totals[j] / sizes[j] for j in odd)]
            size = [*size[:prefix], *(size[i] for i in rest), *(sizes[j] for j in odd)]
        x = [token + block.mlp(block.norm2(token)) for token in x]
    bias = torch.tensor(size, dtype=x[0].dtype).log()[None]
    return model.backbone.head(torch.stack(x)[None], bias)[0]


def published_scores(head, patches, policy):
    """The predictor as published: one linear layer on [own half, mean of the others' half]."""
    x = F.gelu(head.project(head.norm(patches)))
    half = x.shape[1] // 2
    mean = sum(policy[i] * x[i, half:] for i in range(len(x))) / sum(policy)
    weight = torch.cat((head.own.weight, head.whole.weight), dim=1)
    rows = [F.gelu(F.linear(torch.cat((x[i, :half], mean)), weight, head.own.bias)) for i in range(len(x))]
    return torch.stack([head.score(F.gelu(head.narrow(row))).log_softmax(0) for row in rows])


def published_dynamicvit(model, image, counts):
    prefix = model.backbone.num_prefix_tokens
    x = model.backbone.embed(image[None])[0][0]
    for layer, block in enumerate(model.model.blocks, 1):
        x, _, _ = attended(block, x)
        x = x + block.mlp(block.norm2(x))
        if layer < len(counts) and counts[layer] < counts[layer - 1]:
            scores = published_scores(model.selector[str(layer)], x[prefix:], [1.0] * (len(x) - prefix))
            best = sorted(range(len(scores)), key=lambda j: -float(scores[j, 0]))
            x = torch.stack([*x[:prefix], *(x[prefix + j] for j in best[: counts[layer]])])
    return model.backbone.head(x[None])[0]


PREFIXES = {"class token": {}, "four registers": {"reg_tokens": 4}, "average": {"global_pool": "avg"}}
NO_CLASS = {"no class token": {"class_token": False, "global_pool": "avg"}}


@pytest.mark.parametrize("changes", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_evit_is_the_published_rule(changes, fuse):
    model = made("evit" if fuse else "evit-nofuse", 0.6, **changes)
    x = images(model)
    layers = [layer for layer, _ in model.schedule.drops]
    expected = torch.stack([published_evit(model, image, 0.6, layers, fuse) for image in x])
    assert torch.allclose(model(x), expected, atol=1e-9)
    assert not torch.allclose(model(x), model.model(x), atol=1e-3)


@pytest.mark.parametrize("changes", {**PREFIXES, **NO_CLASS}.values(), ids={**PREFIXES, **NO_CLASS})
@torch.no_grad()
def test_tome_is_the_published_rule(changes):
    model = made("tome", 0.6, **changes)
    x = images(model)
    fewer = merges(model.schedule.counts)
    assert sum(fewer) >= 8
    expected = torch.stack([published_tome(model, image, fewer) for image in x])
    assert torch.allclose(model(x), expected, atol=1e-9)
    assert not torch.allclose(model(x), model.model(x), atol=1e-3)


@pytest.mark.parametrize("changes", {**PREFIXES, **NO_CLASS}.values(), ids={**PREFIXES, **NO_CLASS})
@torch.no_grad()
def test_dynamicvit_is_the_published_rule(changes):
    model = made("dynamicvit", 0.6, **changes)
    x = images(model)
    expected = torch.stack([published_dynamicvit(model, image, model.patches_per_layer) for image in x])
    assert torch.allclose(model(x), expected, atol=1e-9)
    assert not torch.allclose(model(x), model.model(x), atol=1e-3)


def test_dynamicvit_trains_by_the_published_rule_and_losses(monkeypatch):
    model = made("dynamicvit", 0.6)
    model.mode = "soft"

    # the better three quarters in the place of a random sample; the gradient stays that of the softmax
    def certain(logits, hard):
        assert hard
        soft = logits.softmax(-1)
        stays = soft[..., 0] > soft[..., 0].quantile(0.25, dim=-1, keepdim=True)
        return torch.stack((stays, ~stays), dim=-1).to(soft.dtype) - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", certain)
    teacher = made("dynamicvit", 0.6)
    teacher.mode = "none"
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.mul_(1.05)
    x = images(model)
    found = model(x)
    logits, losses = [], {"ratio": 0.0, "class": 0.0, "token": 0.0, "left": 0.0}
    counts = model.patches_per_layer
    expected = [teacher.backbone.embed(x)[0], *[None] * 4]
    for layer, block in enumerate(teacher.model.blocks, 1):
        expected[layer] = block(expected[layer - 1])
    distances = []
    for number, image in enumerate(x):
        tokens = model.backbone.embed(image[None])[0][0]
        policy = torch.ones(16, dtype=tokens.dtype)
        cut = False
        for layer, block in enumerate(model.model.blocks, 1):
            keys = torch.cat((torch.ones(1, dtype=tokens.dtype), policy))
            tokens, _, _ = attended(block, tokens, policy=keys if cut else None)
            tokens = tokens + block.mlp(block.norm2(tokens))
            if layer < 4 and counts[layer] < counts[layer - 1]:
                scores = published_scores(model.selector[str(layer)], tokens[1:], list(policy))
                policy = certain(scores, True)[:, 0] * policy
                losses["ratio"] += (policy.mean() - counts[layer] / 16) ** 2 / (3 * len(x))
                cut = True
        assert 0 < policy.sum() < 16
        logits.append(model.backbone.head(tokens[None])[0])
        goal = teacher.model.norm(expected[4][number])
        mine = model.model.norm(tokens)
        distances += [((mine[1 + j] - goal[1 + j]) ** 2).mean() for j in range(16) if policy[j] > 0.5]
        p, q = teacher.backbone.head(expected[4][number][None])[0].log_softmax(0), logits[-1].log_softmax(0)
        losses["class"] += (p.exp() * (p - q)).sum() / len(x)
    assert torch.allclose(found, torch.stack(logits), atol=1e-9)
    total = 2.0 * losses["ratio"] + 0.5 * losses["class"] + 0.5 * sum(distances) / len(distances)
    own = model.own_loss(x, teacher)
    # losses are added up in float32
    assert own.item() == pytest.approx(total.item(), rel=1e-5)
    weights = [model.selector["1"].project.weight, model.model.blocks[0].attn.qkv.weight]
    for got, due in zip(
        torch.autograd.grad(found.sum() + own, weights),
        torch.autograd.grad(torch.stack(logits).sum() + total, weights),
        strict=True,
    ):
        assert due.abs().max() > 0
        assert torch.allclose(got, due, rtol=1e-3, atol=1e-6)


def test_dynamicvit_holds_to_its_ratio_and_only_after_a_soft_pass():
    assert dynamicvit.ratio_loss([torch.tensor([0.5, 0.7])], [0.6]) == pytest.approx(0.01)
    model = made("dynamicvit")
    model(images(model))
    assert model.own_loss(images(model), model) == 0.0


@torch.no_grad()
def test_random_discard_takes_nested_random_subsets(monkeypatch):
    model = made("random", 0.5)
    seen = []
    block = model.backbone.block

    def watched(layer, tokens, *rest):
        seen.append(tokens[:, 1:])
        # blocks that change nothing leave every patch recognisable
        return tokens

    monkeypatch.setattr(model.backbone, "block", watched)
    x = images(model, 3)
    model(x)
    assert [patches.shape[1] for patches in seen] == [16, 8, 4, 2]
    for before, after in itertools.pairwise(seen):
        for i in range(3):
            assert all(any(torch.equal(a, b) for b in before[i]) for a in after[i])
    embedded = model.backbone.embed(x)[0][:, 1:]
    places = [{next(j for j in range(16) if torch.equal(a, embedded[i, j])) for a in seen[1][i]} for i in range(3)]
    assert places[0] != places[1] or places[1] != places[2]
    monkeypatch.setattr(model.backbone, "block", block)
    assert torch.equal(model(x), model(x)), "a measurement can be repeated"
    model.train()
    assert not torch.equal(model(x), model(x)), "training draws anew"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_images_logits_do_not_depend_on_its_neighbours(name):
    model = made(name)
    x = images(model, 3)
    whole = model(x)
    assert torch.allclose(whole[:1], model(x[:1]), atol=1e-9)
    if name != "random":
        assert torch.allclose(whole[1:2], model(x[1:2]), atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", {**PREFIXES, **NO_CLASS}.values(), ids={**PREFIXES, **NO_CLASS})
@torch.no_grad()
def test_the_formula_counts_what_is_computed(name, changes):
    if changes.get("global_pool") == "avg" and name not in ("dynamicvit", "random", *MERGING):
        try:
            model = made(name, 0.7, **changes)
        except SlimError as error:
            pytest.skip(str(error))
    model = made(name, 0.7, **changes)
    done, _ = counted(lambda: model.logits(images(model, 1)))
    assert model.multiply_adds() == pytest.approx(done, rel=1e-6)
    assert model.cost(None) == pytest.approx(counted(lambda: model.model(images(model, 1)))[0], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keep_rate_one_returns_the_backbones_logits(name):
    model = made(name, 1.0)
    x = images(model)
    assert torch.equal(model(x), model.model(x))
    assert model.multiply_adds() == model.architecture().multiply_adds()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [0.8, 0.5])
def test_a_setting_for_a_cost_is_found_and_not_exceeded(name, rate):
    dense = slimcli.slim("digits_vit", rate)
    target = dense.multiply_adds()
    model = plugins.find_method(name)(dense.backbone, dense.schedule)
    model.schedule = model.schedule_for_cost(target)
    assert 0.97 * target < model.multiply_adds() <= target
    with pytest.raises(SlimError, match=f"{name} cannot cost as little as"):
        model.schedule_for_cost(target / 100)


def test_a_keep_rate_costs_tome_the_same_from_a_recipe_and_from_a_folder(tmp_path):
    model = slim("digits_vit", 0.7, method="tome")
    save_model(tmp_path, model, {"model": {"name": "digits_vit", "args": {}}})
    loaded = slimcli.load(tmp_path)
    assert loaded.schedule == model.schedule
    for rate in (0.9, 0.7, 0.5):
        assert loaded.at_keep_rate(rate) == model.at_keep_rate(rate)
        assert 0.98 * model.usual_cost(rate) <= loaded.cost(loaded.at_keep_rate(rate)) <= model.usual_cost(rate)
    assert not loaded.at_keep_rate(1.0).drops_patches()


def test_tome_merges_nearly_as_many_in_every_block():
    model = slim("digits_vit", 0.7, method="tome")
    fewer = merges(model.schedule.counts)
    assert max(fewer) - min(fewer) <= 1
    assert model.multiply_adds() <= slim("digits_vit", 0.7).multiply_adds()
    model.keep_rate = 0.5
    assert max(merges(model.schedule.counts)) > max(fewer)
    with pytest.raises(SlimError, match="at most 32 of 64 patches in block 1"):
        model.keep_rate = [64, 20, *[20] * 10]


@pytest.mark.parametrize(
    ("name", "build", "reason"),
    [
        ("evit", {"class_token": False, "global_pool": "avg"}, "no class token"),
        ("evit-nofuse", {"class_token": False, "global_pool": "avg"}, "no class token"),
        ("evit", "eva02_tiny_patch14_224", "no place for its rotary"),
        ("evit-nofuse", "beit_base_patch16_224", "adds relative positions"),
        ("tome", "eva02_tiny_patch14_224", "no place for its rotary"),
        ("tome", "beit_base_patch16_224", "no place for its rotary"),
        ("tome", "cait_xxs24_224", "scaled_dot_product_attention"),
        ("evit", "cait_xxs24_224", "no class token"),
    ],
)
def test_a_model_that_a_method_cannot_serve_is_refused_with_the_reason(name, build, reason):
    dense = tiny_vit(**build) if isinstance(build, dict) else plugins.check_models("timm")[build]()
    with pytest.raises(SlimError, match=f"the method {name} cannot run .*{reason}"):
        slim(dense, 0.7, method=name)


@pytest.mark.parametrize("model", families())
@torch.no_grad()
def test_every_kind_of_backbone_runs_every_method_or_is_refused(model):
    ran = []
    for name in NAMES:
        torch.manual_seed(0)
        dense = plugins.check_models("timm")[model]().eval()
        for parameter in dense.parameters():
            # initial weights make scores that are equal but for rounding
            torch.nn.init.normal_(parameter, std=0.2)
        try:
            slimmed = slim(dense, 0.5, method=name).double().eval()
        except SlimError as error:
            assert re.match(f"the method {name} cannot (run|cost as little)", str(error))
            continue
        x = images(slimmed)
        output = slimmed.logits(x)
        assert output.isfinite().all()
        if output.dim() == 2:
            alone = slimmed.logits(x[:1])
            assert torch.allclose(output[:1], alone, atol=1e-4)
            assert slimmed.multiply_adds() < slimmed.cost(None)
        ran.append(name)
    assert {"dynamicvit", "random"} <= set(ran)


@torch.no_grad()
def test_without_halves_patches_leave_after_the_block(monkeypatch):
    split = made("evit", 0.6)
    known = split.multiply_adds()
    monkeypatch.setattr(type(split.backbone), "halves", lambda self, layer: None)
    # what was found of models with halves
    monkeypatch.setattr(likeness, "_FOUND", {})
    for name in ("evit", "tome"):
        whole = made(name, 0.6)
        assert facts(whole.backbone).mlp_weights is None
        done, _ = counted(lambda whole=whole: whole.logits(images(whole, 1)))
        assert whole.multiply_adds() == pytest.approx(done, rel=1e-6)
    assert made("evit", 0.6).multiply_adds() > known


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_saved_and_loaded_with_the_model(name, tmp_path):
    model = slim(tiny_vit(), 0.6, method=name).eval()
    save_model(tmp_path, model, {"model": {"name": "vit_tiny_patch16_224", "args": ARGS}})
    again = slimcli.load(tmp_path)
    assert type(again) is type(model)
    x = images(model)
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-6)


@torch.no_grad()
def test_a_method_is_served_by_every_command_or_refused_in_a_line(slim, refused, tmp_path):
    recipe = ["paper-digits", "--set", 'slimming.method="tome"']
    found = slim("eval", *recipe, "--limit", 20)
    assert found.exit_code == 0
    assert "life head" not in found.stderr, "it has none to train"
    assert slim("prune", *recipe, "-o", "deployed", "--limit", 20).exit_code == 0
    card = (tmp_path / "deployed" / "README.md").read_text()
    assert "by the method tome, made with slim" in card and "Lives" not in card
    assert slimcli.load("deployed").patches_per_layer == slimcli.slim("digits_vit", 0.7, method="tome").schedule.counts
    for words, part in (
        (["show", "--run", "deployed"], "tome predicts no lives"),
        (["profile", "deployed", "--per-layer", "--seconds", 0], "--per-layer is for life regression"),
        (["eval", "deployed", "--dead", "heir"], "slimming.dead is for the method life: tome"),
        (["calibrate", *recipe, "--images", 8, "--limit", 8], "tome has no life head"),
    ):
        assert part in refused(*words)


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_learns_through_every_method(name):
    model = made(name).train()
    model(images(model)).square().sum().backward()
    gradient = model.model.patch_embed.proj.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient_of_dynamicvit():
    gradients = []
    for saving in (False, True):
        model = made("dynamicvit").train()
        model.mode, model.grad_checkpointing = "soft", saving
        torch.manual_seed(3)
        model(images(model)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("random", "atc", "atc-complete")])
def test_a_method_is_one_graph_with_static_shapes(name):
    # compiling takes as long as there are blocks
    model = made(name, depth=3)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-9)


def test_a_mode_that_a_method_does_not_know_is_refused():
    with pytest.raises(
        SlimError, match=r"^mode = 'soft' is not possible for the method tome: expected one of none, hard$"
    ):
        made("tome").mode = "soft"


def test_dynamicvit_needs_a_score_head_for_every_drop_layer():
    model = made("dynamicvit")
    model.keep_rate = [(1, 0.5)]
    model(images(model))
    other = slim(tiny_vit(), 0.5, drop_layers=[1], method="dynamicvit").eval()
    other.keep_rate = [(2, 0.5)]
    with pytest.raises(SlimError, match="no score head after block 2: it has them after 1"):
        other(images(other))


def test_a_plugin_adds_a_method_as_the_page_shows(slim):
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    manager = plugins.plugin_manager()
    manager.register(names["MyPlugin"](), name="mine")
    try:
        model = slimcli.slim(tiny_vit(), 0.5, method="norm").eval()
        assert type(model) is names["Norm"]
        embedded = model.backbone.embed(images(model))[0]
        kept = embedded[:, 1:][torch.arange(2)[:, None], model.choose(1, embedded, 8)].norm(dim=-1)
        assert kept.min() >= embedded[:, 1:].norm(dim=-1).median(dim=1).values.min()
        plain = slimcli.slim(tiny_vit(), 0.5, method="random")
        assert model.multiply_adds() == plain.multiply_adds() + (16 + 8 + 4) * 32
        assert plugins.methods()["norm"].plugin == "mine"
        assert next(p for p in plugins.installed() if p.name == "mine").methods == {
            "norm": "patches with the longest tokens go on"
        }
        rows = document(slim("profile", "digits_vit", "--against", "norm", "--seconds", 0, "--json"))["rows"]
        assert [row["method"] for row in rows] == [None, "life", "norm"]
        manager.register(names["MyPlugin"](), name="twice")
        with pytest.raises(SlimError, match="'norm' is claimed by the plugins"):
            slimcli.slim(tiny_vit(), 0.5, method="norm")
    finally:
        manager.unregister(name="mine")
        if manager.has_plugin("twice"):
            manager.unregister(name="twice")


def test_an_unknown_method_is_refused_with_the_nearest(refused):
    with pytest.raises(SlimError, match="no method is called 'tomee': did you mean tome"):
        slim(tiny_vit(), 0.5, method="tomee")
    assert "no method is called 'evti'" in refused("train", "quickstart", "--set", "slimming.method=evti")


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_trains_any_method(slim, tiny_recipe, name, tmp_path):
    stages = [f'slimming.method="{name}"', "stages.0.learns=backbone", "stages.0.mode=hard", "stages.1.mode=hard"]
    if "soft" in plugins.find_method(name).modes:
        stages[1:] = ["stages.0.learns=both", "stages.1.mode=soft", "stages.1.learns=both"]
    summary = document(slim("train", tiny_recipe, *(w for s in stages for w in ("--set", s)), "--json"))
    assert summary["rows"][1]["gmacs"] < summary["rows"][0]["gmacs"]
    model = slimcli.load(tmp_path / summary["run"])
    assert model.method == name


def test_profile_measures_rivals_in_the_same_run(slim):
    others = "evit,evit-nofuse,dynamicvit,tome,random"
    words = ["profile", "digits_vit", "--batch-size", 1, "--seconds", 0]
    rows = document(slim(*words, "--keep-rate", "0.7,0.5", "--against", others, "--json"))["rows"]
    names = ["life", *others.split(",")]
    assert [row["method"] for row in rows] == [None, *(name for name in names for _ in range(2))]
    assert [row["keep_rate"] for row in rows] == [None, *[0.7, 0.5] * 6]
    assert all(row["realised"] > 0 for row in rows)
    cost = {(row["method"], row["keep_rate"]): row["gmacs"] for row in rows}
    for rate in (0.7, 0.5):
        assert 0.98 * cost["life", rate] <= cost["tome", rate] <= cost["life", rate]
        assert cost["random", rate] <= cost["life", rate] < cost["dynamicvit", rate] < cost[None, None]
    # the longest name makes the widest table
    table = slim(*words, "--keep-rate", "0.5", "--against", "evit-nofuse").stdout.splitlines()
    assert all(len(line) <= 80 for line in table)
    assert any(line.startswith("evit-nofuse 0.5 ") for line in table)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["profile", "digits_vit", "--against", "evti"], "no method is called 'evti': did you mean evit?"),
        (["profile", "digits_vit", "--against", "life"], "'life' is what the others are compared with"),
        (["profile", "eva02_tiny_patch14_224", "--img-size", 56, "--against", "tome"], "tome cannot run Eva"),
    ],
)
def test_bad_input_is_one_clear_line(refused, words, part):
    assert part in refused(*words)


def test_the_documented_method_runs_and_is_measured(monkeypatch):
    """The example of docs/methods.md, as a plugin's author copies it."""
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    defined: dict[str, Any] = {}
    exec(example, defined)
    manager = plugins.plugin_manager()
    manager.register(defined["MyPlugin"](), name="documented")
    try:
        model = slim(tiny_vit(), 0.5, life_layer=1, method="norm").eval()
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert model(x).shape == (2, 10)
            counted_cost, _ = counted(lambda: model.logits(x[:1]))
        assert abs(model.cost(model.schedule) - counted_cost) < 0.01 * counted_cost
    finally:
        manager.unregister(name="documented")


def test_the_documented_names_of_a_method_exist():
    """What docs/methods.md says can be overridden is what the model calls."""
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(\w+)`", page.partition("A rule can also\noverride")[2]))
    names -= {"soft", "hard"}
    assert {"refusal", "slimmed", "cost"} <= names
    assert [name for name in sorted(names) if not hasattr(Method, name)] == []


def test_a_method_is_abstract_or_final():
    """No method builds on another one, and no rival has what is life regression's alone."""
    kinds = [entry.kind for entry in plugins.methods().values()]
    for kind in kinds:
        assert not [other for other in kinds if other is not kind and issubclass(kind, other)]
    with pytest.raises(TypeError, match="abstract"):
        SlimModel(slim(tiny_vit(), 0.5).backbone, slim(tiny_vit(), 0.5).schedule)
    random = slim(tiny_vit(), 0.5, method="random")
    for name in ("dead", "redundancy", "merge_importance", "size_bias", "life", "life_head", "block_cost"):
        assert not hasattr(random, name), name
    assert isinstance(random, SlimModel) and not isinstance(random, LifeModel)


def test_what_is_run_in_another_way_is_restored_after_an_error():
    model = slim(tiny_vit(), 0.5, life_layer=1)
    schedule = model.schedule
    with pytest.raises(RuntimeError), model.running(mode="none", schedule=schedule.at_keep_rate(0.3)):
        model.exact_savings = True
        raise RuntimeError
    assert (model.mode, model.schedule, model.exact_savings) == ("hard", schedule, False)
    with pytest.raises(SlimError, match="mode = 'best'"), model.running(exact_savings=True, mode="best"):
        pass
    assert not model.exact_savings
