"""The life head and soft weights: the specification's equations."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from slimcli.life import (
    LifeHead,
    choose_heirs,
    cosines,
    inherit,
    log_soft_weight,
    log_straight_weight,
    longest_lives_first,
    normalise_life,
    redundancy,
    sort_patches,
    take_patches,
)


def random_head(global_token="cls"):
    torch.manual_seed(0)
    head = LifeHead(16, global_token)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def test_lives_have_the_target_moments_in_every_image():
    life = normalise_life(torch.randn(5, 50) * 7 + 3, 8.29, 3.32)
    assert torch.allclose(life.mean(1), torch.full((5,), 8.29), atol=1e-4)
    assert torch.allclose(life.std(1, unbiased=False), torch.full((5,), 3.32), atol=1e-4)


def test_equal_scores_give_equal_lives_and_no_nan():
    assert torch.equal(normalise_life(torch.ones(1, 4), 2.0, 1.0), torch.full((1, 4), 2.0))


@pytest.mark.parametrize("global_token", ["cls", "mean"])
def test_the_folded_product_is_the_papers_score(global_token):
    head, tokens = random_head(global_token), torch.randn(3, 2 + 9, 16)
    h = head.norm(tokens)
    whole = h[:, 0] if global_token == "cls" else h[:, 2:].mean(1)
    plain = (head.query(whole)[:, None] * head.key(h[:, 2:])).sum(-1)
    assert torch.allclose(head.score(tokens, 2), plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_lives_are_float32_whatever_the_tokens_are(dtype):
    head, tokens = random_head().to(dtype), torch.randn(2, 10, 16, dtype=dtype)
    assert head(tokens, 1, 2.0, 1.0).dtype == torch.float32


def test_autocast_does_not_change_the_lives():
    head, tokens = random_head(), torch.randn(2, 10, 16)
    plain = head(tokens, 1, 2.0, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(tokens, 1, 2.0, 1.0), plain)


def test_the_bias_multiplies_the_exponentials():
    life = torch.tensor([[2.0, 5.0, 9.0]])
    logits = torch.randn(1, 3)
    weight = torch.sigmoid(1.5 * (life - 6))
    plain = weight * logits.exp() / (weight * logits.exp()).sum()
    assert torch.allclose(F.softmax(logits + log_soft_weight(life, 6, 1.5), -1), plain, atol=1e-6)


def test_the_bias_of_a_long_dead_patch_is_finite():
    bias = log_soft_weight(torch.tensor([[-1000.0]]), 12, 3.0)
    assert math.isfinite(bias.item())


def test_a_longer_life_never_weighs_less():
    life = torch.linspace(-3, 15, 50)[None]
    for layer in (1, 6, 12):
        assert (log_soft_weight(life, layer, 1.5).diff() >= 0).all()


def test_order_is_longest_first_with_ties_in_raster_order():
    life = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert longest_lives_first(life, 3).tolist() == [[1, 3, 2]]


def test_patches_are_taken_in_order_for_any_trailing_shape():
    patches = torch.arange(24).reshape(1, 4, 3, 2)
    order = torch.tensor([[2, 0], [1, 3]])
    taken = take_patches(patches, order)
    assert taken.shape == (2, 2, 3, 2)
    assert torch.equal(taken[1, 0], patches[0, 1])


def slow_heirs(patches, weights, counts):
    """The rule in words: one image, one patch at a time. Tokens, weights and numbers of patches."""
    kept = {i: (patches[i].clone(), float(weights[i]), 1.0) for i in range(len(patches))}
    cosine = F.cosine_similarity(patches[:, None], patches[None], dim=-1)
    for before, after in itertools.pairwise(counts):
        bequests = {heir: [kept[heir]] for heir in range(after)}
        for dead in range(after, before):
            bequests[int(cosine[dead, :after].argmax())].append(kept[dead])
        kept = {
            heir: (
                sum(weight * token for token, weight, _ in parts) / sum(weight for _, weight, _ in parts),
                sum(weight for _, weight, _ in parts),
                sum(size for _, _, size in parts),
            )
            for heir, parts in bequests.items()
        }
    tokens, *masses = zip(*kept.values(), strict=True)
    return torch.stack(tokens), torch.tensor(masses).T


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_sorting_the_patches_leaves_the_prefix_tokens_in_front(prefix):
    tokens = torch.randn(3, prefix + 7, 4)[..., ::2].requires_grad_()
    order = torch.stack([torch.randperm(7)[:5] for _ in range(3)])
    found = sort_patches(tokens, order, prefix)
    expected = torch.cat((tokens[:, :prefix], take_patches(tokens[:, prefix:], order)), dim=1)
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((tensor * weights).sum(), tokens)[0] for tensor in (found, expected)]
    assert torch.equal(*gradients)


def test_heirs_are_as_the_rule_says():
    patches, counts = torch.randn(3, 20, 8), (20, 13, 6, 2)
    weights = torch.rand(3, 20) + 0.5
    now, mass = patches, torch.stack((weights, torch.ones(3, 20)), dim=-1)
    order = torch.stack([torch.randperm(20) for _ in range(3)])
    raster = torch.empty_like(patches).scatter(1, order[..., None].expand_as(patches), patches)
    heirs = choose_heirs(cosines(raster), order, counts)
    for before, after in itertools.pairwise(counts):
        now, mass = inherit(now, mass, heirs[:, after:before])
    assert now.shape == (3, 2, 8)
    for image in range(3):
        expected, masses = slow_heirs(patches[image], weights[image], counts)
        assert torch.allclose(now[image], expected, atol=1e-5)
        assert torch.allclose(mass[image], masses)
    assert torch.equal(mass[..., 1].sum(1), torch.full((3,), 20.0))


def test_redundancy_is_the_highest_cosine_to_a_patch_of_higher_score():
    torch.manual_seed(0)
    features, score = torch.randn(2, 7, 5), torch.randn(2, 7)
    found = redundancy(cosines(features), score)
    for image in range(2):
        for i in range(7):
            above = [j for j in range(7) if score[image, j] > score[image, i]]
            said = [float(F.cosine_similarity(features[image, i], features[image, j], dim=0)) for j in above]
            assert found[image, i].item() == pytest.approx(max(said, default=-1.0), abs=1e-5)


@torch.no_grad()
def test_of_two_patches_that_say_the_same_the_less_important_dies_early():
    head, tokens = random_head(), torch.randn(1, 1 + 8, 16)
    best = int(head.score(tokens, 1).argmax())
    twin = (best + 1) % 8
    tokens[0, 1 + twin] = tokens[0, 1 + best] + 1e-3 * torch.randn(16)
    plain = head(tokens, 1, 5.0, 2.0)[0]
    less = min(best, twin, key=lambda i: float(plain[i]))
    assert int(plain.argmin()) not in (best, twin)
    head.redundancy = 25.0
    found = head(tokens, 1, 5.0, 2.0)[0]
    assert int(found.argmin()) == less
    assert found.mean().item() == pytest.approx(5.0, abs=1e-4)
    assert found.std(unbiased=False).item() == pytest.approx(2.0, abs=1e-3)


def test_redundancy_leaves_the_gradient_to_the_score():
    head = random_head()
    head.similarity_dim, head.redundancy = 4, 5.0
    head(torch.randn(2, 1 + 8, 16), 1, 5.0, 2.0)[:, 0].sum().backward()
    assert head.query.weight.grad.abs().sum() > 0
    assert head.similarity.projection.weight.grad is None


def test_patches_are_compared_by_a_projection_of_the_chosen_width():
    head, patches = random_head(), torch.randn(2, 8, 16, dtype=torch.bfloat16)
    assert torch.equal(head.features(patches), patches.float())
    head.similarity_dim = 4
    assert head.features(patches).shape == (2, 8, 4) and head.features(patches).dtype == torch.float32
    assert {"similarity.norm.weight", "similarity.projection.weight"} <= set(head.state_dict())
    head.similarity_dim = 0
    assert not any(name.startswith("similarity") for name in head.state_dict())


def test_the_straight_weight_is_hard_forward_and_soft_backward():
    life = torch.tensor([[3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    used = torch.tensor([[True, False]])
    weight = log_straight_weight(life, used, 2, 1.5).exp()
    assert torch.allclose(weight, used.double(), atol=2e-4)
    weight.sum().backward()
    soft = (1.5 * (life.detach() - 2)).sigmoid()
    assert torch.allclose(life.grad, 1.5 * soft * (1 - soft))


def test_weights_bring_their_projection():
    taught, plain = random_head(), LifeHead(16)
    taught.similarity_dim = 4
    plain.load_state_dict(taught.state_dict())
    assert torch.equal(plain.similarity.projection.weight, taught.similarity.projection.weight)
    plain.load_state_dict(random_head().state_dict())
    assert plain.similarity_dim == 0
