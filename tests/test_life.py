"""The life head and soft weights: the specification's equations."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from slimcli.life import (
    LifeHead,
    lives_in_order,
    log_soft_weight,
    log_straight_weight,
    longest_lives_first,
    normalise_life,
    plan,
    shares,
    sort_patches,
    take_over,
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
    assert torch.allclose(head.read(tokens, 2)[0], plain, rtol=1e-4, atol=1e-3)


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


def slow_inheritance(patches, weights, heirs, counts):
    """In words: one image, one patch at a time. Tokens, weights and numbers of patches."""
    kept = {i: (patches[i].clone(), float(weights[i]), 1.0) for i in range(len(patches))}
    for before, after in itertools.pairwise(counts):
        bequests = {heir: [kept[heir]] for heir in range(after)}
        for dead in range(after, before):
            bequests[int(heirs[dead])].append(kept[dead])
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


def test_a_heir_becomes_the_weighted_mean_of_all_it_took_over():
    patches, counts = torch.randn(3, 20, 8), (20, 13, 6, 2)
    weights = torch.rand(3, 20) + 0.5
    found = plan(patches, weights, counts)._replace(weight=weights)
    for prefix in (0, 2):
        first = torch.randn(3, prefix, 8)
        now, table = torch.cat((first, patches), dim=1), shares(found, counts, prefix, torch.float32)
        for time, after in enumerate(counts[1:]):
            now = take_over(now, table, time, prefix + after)
        sizes = table.log_size[:, -1, : prefix + 2].exp()
        assert now.shape == (3, prefix + 2, 8)
        assert torch.equal(now[:, :prefix], first)
        for image in range(3):
            expected, masses = slow_inheritance(patches[image], weights[image], found.heirs[image], counts)
            assert torch.allclose(now[image, prefix:], expected, atol=1e-5)
            assert torch.allclose(sizes[image, prefix:], masses[:, 1])
        torch.testing.assert_close(sizes.sum(dim=1), torch.full((3,), 20.0 + prefix))


def test_of_two_patches_that_say_the_same_the_less_important_leaves_early():
    torch.manual_seed(0)
    features, score = torch.randn(1, 8, 16), torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 4.5, 2.5]])
    features[0, 6] = features[0, 0] + 1e-3
    by_importance = plan(features, score, (8, 7, 3), 0.0)
    assert by_importance.order[0].tolist() == [0, 6, 2, 4, 7, 3, 1, 5]
    found = plan(features, score, (8, 7, 3), 25.0)
    assert found.order[0, -1] == 6 and found.order[0, found.heirs[0, -1]] == 0


def test_who_took_over_much_stays():
    # three alike and one apart: once two of the three are joined they outweigh it
    unit = torch.eye(4)
    features = torch.stack((unit[0], unit[0] + 0.05 * unit[1], unit[2], unit[2] + 0.3 * unit[3])).unsqueeze(0)
    score = torch.tensor([[0.1, 0.0, 0.3, 0.2]])
    first, second = plan(features, score, (4, 3, 2), 1.0).order[0, [3, 2]].tolist()
    assert (first, second) == (1, 3)


def test_heirs_stay_when_those_leave_who_name_them():
    counts = (20, 13, 6, 2)
    for redundancy in (0.0, 3.5):
        found = plan(torch.randn(3, 20, 8), torch.randn(3, 20), counts, redundancy, 0.7)
        assert torch.equal(found.order.sort(dim=1).values, torch.arange(20).expand(3, -1))
        for before, after in itertools.pairwise(counts):
            assert (found.heirs[:, after:before] < after).all()


def test_scores_and_features_of_any_scale_do_not_overflow():
    score = torch.zeros(1, 900)
    score[0, :2] = torch.tensor([1e4, 1e3])
    features = torch.cat((torch.randn(1, 450, 4), torch.zeros(1, 450, 4)), dim=1)
    found = plan(features * 1e6, score, (900, 400, 10), 0.1, 0.7)
    assert torch.equal(found.order.sort(dim=1).values, torch.arange(900).expand(1, -1))
    assert found.order[0, 0] == 0


def test_lives_in_order_end_where_the_schedule_says():
    counts = (9, 9, 6, 6, 2)
    order = torch.stack([torch.randperm(9) for _ in range(2)])
    life = lives_in_order(order, counts)
    assert torch.equal(longest_lives_first(life, 9), order)
    for layer, n in enumerate(counts, 1):
        assert ((life >= layer).sum(dim=1) == n).all()


def test_a_head_compares_patches_by_what_it_was_extended_with():
    head, tokens = random_head(), torch.randn(2, 1 + 8, 16, dtype=torch.bfloat16)
    score, features = head.read(tokens, 1)
    assert torch.equal(features, tokens[:, 1:].float()) and head.read(tokens, 1, compare=False)[1] is None
    head.extend(4)
    assert head.read(tokens, 1)[1].shape == (2, 8, 4) and head.read(tokens, 1)[1].dtype == torch.float32
    head.extend(4, 32)
    # a block that was never taught changes nothing
    assert torch.equal(head.read(tokens, 1)[0], score)
    torch.nn.init.normal_(head.context.score.weight)
    again = head.read(tokens, 1)[0]
    assert not torch.equal(again, score) and again.dtype == torch.float32
    moved = tokens.clone()
    moved[:, -1] *= -1
    # what one patch says changes the score of another
    assert not torch.allclose(head.read(moved, 1)[0][:, 0], again[:, 0])
    head.extend()
    assert not any(name.startswith(("similarity", "context")) for name in head.state_dict())
    with pytest.raises(ValueError, match="needs similarity_dim"):
        head.extend(0, 32)


def test_the_straight_weight_is_hard_forward_and_soft_backward():
    life = torch.tensor([[3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    used = torch.tensor([[True, False]])
    weight = log_straight_weight(life, used, 2, 1.5).exp()
    assert torch.allclose(weight, used.double(), atol=2e-4)
    weight.sum().backward()
    soft = (1.5 * (life.detach() - 2)).sigmoid()
    assert torch.allclose(life.grad, 1.5 * soft * (1 - soft))


def test_weights_bring_their_projection_and_their_block():
    taught, plain = random_head(), LifeHead(16)
    taught.extend(4, 32)
    plain.load_state_dict(taught.state_dict())
    assert torch.equal(plain.similarity.projection.weight, taught.similarity.projection.weight)
    assert torch.equal(plain.context.qkv.weight, taught.context.qkv.weight)
    plain.load_state_dict(random_head().state_dict())
    assert (plain.similarity_dim, plain.context_dim) == (0, 0)


def _blended(seed):
    """A head whose norms, projection and block all say something."""
    head = LifeHead(16)
    head.extend(8, 32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_normalised_once_say_what_each_norm_would_say(dtype):
    """Whatever became of the weights since they were folded."""
    head, tokens = _blended(0).to(dtype), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}

    def check(head):
        expected = head.read(tokens.to(head.query.weight.dtype), 1)
        with torch.no_grad():
            found = head.read(tokens.to(head.query.weight.dtype), 1)
        assert head._kept is not None
        torch.testing.assert_close(*((score - score.mean(1, keepdim=True)) for score, _ in (found, expected)), **near)
        torch.testing.assert_close(found[1], expected[1], **near)

    check(head)
    other = copy.deepcopy(head)
    check(other)
    with torch.no_grad():
        head.norm.weight.mul_(-2)
    check(head)
    check(other)
    head.load_state_dict(_blended(2).to(dtype).state_dict())
    check(head)
    head.load_state_dict(_blended(3).to(dtype).state_dict(), assign=True)
    check(head)
    check(head.to(torch.bfloat16).to(dtype))
    head.extend(8, 0)
    assert head.read(tokens, 1)[1].shape == (2, 8, 8)
