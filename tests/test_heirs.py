"""Heirs: who takes over, when, with what weight, and what it costs, against a slow version of the rule."""

import math

import pytest
import torch
from test_slimming import SHAPES, images, slimmed
from torch.nn import functional as F

from slimcli import slim
from slimcli.backbones.counting import counted
from slimcli.backbones.timm_vit import build_model
from slimcli.life import normalise_life

COUNTS = [16, 12, 7, 3]


def plain_block(block, tokens, sizes, reading, exponent):
    """A block in plain formulas for one image: the tokens `reading` (m, D) attend to `tokens` (n, D)."""
    heads, width = block.attn.num_heads, tokens.shape[1]
    query, key, value = block.attn.qkv.weight.chunk(3)
    biases = block.attn.qkv.bias.chunk(3)
    q, k, v = (
        F.linear(block.norm1(x), weight, bias).reshape(-1, heads, width // heads).transpose(0, 1)
        for x, weight, bias in zip((reading, tokens, tokens), (query, key, value), biases, strict=True)
    )
    logits = q @ k.transpose(1, 2) / math.sqrt(width // heads) + exponent * sizes.log()
    attended = (logits.softmax(dim=-1) @ v).transpose(0, 1).reshape(-1, width)
    out = reading + block.ls1(block.attn.proj(attended))
    return out + block.ls2(block.mlp(block.norm2(out)))


def merged(tokens, weights, sizes, heirs, stay, prefix):
    """The tokens that stay, each the mean of itself and of those it takes over; their weights and sizes."""
    rows, new_weights, new_sizes = [], [], []
    for place in range(prefix + stay):
        parts = [place] + [prefix + dead for dead, heir in heirs.items() if prefix + heir == place]
        total = sum(weights[part] for part in parts)
        rows.append(sum(weights[part] * tokens[part] for part in parts) / total)
        new_weights.append(total)
        new_sizes.append(sum(sizes[part] for part in parts))
    return torch.stack(rows), torch.stack(new_weights), torch.stack(new_sizes)


def slow_plan(features, score, counts, redundancy, importance):
    """The rule in words, for one image: patches, longest life first, and the heir of each that leaves."""
    standard = normalise_life(score[None], 0.0, 1.0)[0]
    groups = {i: [i] for i in range(len(score))}
    order, heirs = [], {}

    def mean(i):
        weights = (importance * standard[groups[i]]).exp()
        return (weights[:, None] * features[groups[i]]).sum(0) / weights.sum()

    def alike(i, j):
        return F.cosine_similarity(mean(i) - mean(i).mean(), mean(j) - mean(j).mean(), dim=0)

    def mass(i):
        return (standard[groups[i]] / redundancy).exp().sum()

    def cost(i):
        if redundancy == 0:
            return standard[i]
        above = [j for j in groups if standard[j] > standard[i]]
        return min(((mass(i) * mass(j)).sqrt() * (1 - alike(i, j)) for j in above), default=math.inf)

    for stay in dict.fromkeys(counts[1:]):
        ranked = sorted(groups, key=lambda i: float(cost(i)), reverse=True)
        leave = ranked[stay:]
        for i in leave:
            heirs[i] = max(ranked[:stay], key=lambda j, i=i: float(alike(i, j)))
        order = leave + order
        for i in leave:
            groups[heirs[i]] = groups[heirs[i]] + groups[i]
        groups = {i: group for i, group in groups.items() if i not in leave}
    return sorted(groups, key=lambda i: float(standard[i]), reverse=True) + order, heirs


def slow_heirs(model, image):
    """Logits of one image, patch by patch."""
    backbone, prefix = model.backbone, model.backbone.num_prefix_tokens
    tokens, _ = backbone.embed(image[None])
    tokens = backbone.block(1, tokens)
    score, features = (found[0] for found in model.life_head.read(tokens, prefix))
    order, names = slow_plan(features, score, COUNTS, model.redundancy, model.merge_importance)
    heir_of = {order.index(i): order.index(j) for i, j in names.items()}
    tokens = torch.cat((tokens[0, :prefix], tokens[0, prefix:][order]))
    ones = torch.ones(prefix)
    weights = torch.cat((ones, (model.merge_importance * normalise_life(score, 0.0, 1.0)[order]).exp()))
    sizes = torch.cat((ones, torch.ones(len(order))))

    def take_over(n, stay):
        return merged(tokens, weights, sizes, {dead: heir_of[dead] for dead in range(stay, n)}, stay, prefix)

    tokens, weights, sizes = take_over(COUNTS[0], COUNTS[1])
    for layer in (2, 3, 4):
        block, present = model.model.blocks[layer - 1], (tokens, sizes)
        if layer < 4:
            # keys and values of all; queries of what is left when heirs have taken over
            tokens, weights, sizes = take_over(COUNTS[layer - 1], COUNTS[layer])
        tokens = plain_block(block, *present, tokens, model.size_bias)
    return backbone.head(tokens[None], sizes.log()[None])[0]


def taught(model, redundancy=2.0):
    """A head with a projection and a block that adds to it, as a calibration leaves it."""
    model.life_head.extend(8, 32)
    for last in (model.life_head.context.score, model.life_head.context.features):
        torch.nn.init.normal_(last.weight, std=0.1)
    model.redundancy = redundancy
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class token", "class token, average", "four registers", "no prefix, average"])
@pytest.mark.parametrize(("redundancy", "importance", "size_bias"), [(0.0, 0.0, 1.0), (2.0, 0.0, 1.0), (3.5, 0.7, 0.6)])
def test_heirs_take_over_before_the_queries_of_a_patchs_last_block(kind, redundancy, importance, size_bias):
    model = slimmed(COUNTS, **SHAPES[kind])
    model.dead, model.merge_importance, model.size_bias = "heir", importance, size_bias
    taught(model, redundancy)
    x = images(model)
    expected = torch.stack([slow_heirs(model, image) for image in x])
    for model.exact_savings in (False, True):
        torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-4)
    if redundancy > 0:
        for layer, n in enumerate(COUNTS, 1):
            assert ((model.life >= layer).sum(dim=1) == n).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class token", "four registers"])
def test_the_cost_formula_counts_what_heirs_cost(kind):
    model = slimmed(COUNTS, **SHAPES[kind])
    model.dead = "heir"
    taught(model)
    for model.exact_savings in (False, True):
        cost, _ = counted(lambda: model(images(model, 1)))
        assert cost == model.multiply_adds()
    # beside discarding with the same head and the same plan
    discarding = taught(slimmed(COUNTS, **SHAPES[kind]))
    assert model.cost(model.schedule) < discarding.cost(discarding.schedule)


def test_planning_leaves_the_gradient_to_the_score():
    model = taught(slimmed(COUNTS))
    model.mode = "soft"
    model(images(model)).square().sum().backward()
    assert model.life_head.query.weight.grad.abs().sum() > 0
    assert model.life_head.context.score.weight.grad.abs().sum() > 0
    assert model.life_head.similarity.projection.weight.grad is None
    assert model.life_head.context.features.weight.grad is None


@torch.no_grad()
def test_where_a_block_runs_whole_heirs_take_over_after_it():
    model = slimmed(COUNTS)
    model.dead = "heir"
    x = images(model)
    inside = model(x)
    saved = model.multiply_adds()
    whole = slimmed(COUNTS)
    whole.dead = "heir"
    for block in whole.model.blocks:
        # a forward of somebody's own: nobody knows what it does for some tokens alone
        block.forward = block.forward
    after = whole(x)
    assert after.isfinite().all()
    assert not torch.allclose(inside, after, atol=1e-4)
    cost, _ = counted(lambda: whole(x[:1]))
    assert cost == whole.multiply_adds() > saved


def test_patches_of_equal_importance_weigh_alike():
    model = slimmed(COUNTS)
    model.dead = "heir"
    for parameter in model.life_head.key.parameters():
        torch.nn.init.zeros_(parameter)  # every score is 0
    x = images(model)
    with torch.no_grad():
        before = model(x)
        model.merge_importance = 0.7
        assert torch.equal(model(x), before)


def test_heirs_cost_less_than_discarding_with_the_same_patches():
    heirs = slim(build_model("deit_small_patch16_224", False, {}), 0.7, dead="heir")
    discard = slim(build_model("deit_small_patch16_224", False, {}), 0.7)
    # three drops, of which one is after the life layer itself: those that leave after blocks 7 and 10 are keys only
    narrow = [(138, 97, 7), (97, 68, 10)]
    architecture = heirs.architecture()
    saved = sum(architecture.block(t, n) - architecture.narrow_block(t, n, m + 1) for n, m, t in narrow)
    compared = (58 * 138 + 41 * 97 + 29 * 68) * 384
    added = (58 * 139 + 41 * 98 + 29 * 69) * 384
    assert heirs.multiply_adds() == discard.multiply_adds() - saved + compared + added
