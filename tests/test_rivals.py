"""Methods of other papers, each against a slow, obvious version of its rule."""

import itertools
import math

import pytest
import torch
from published import attended, images, made
from torch.nn import functional as F

from slimcli.errors import SlimError
from slimcli.methods import ia_red2
from slimcli.methods.merging import merges
from slimcli.training.tasks import Batch, TeacherOutput

PREFIXES = {"class token": {}, "four registers": {"reg_tokens": 4}, "no class token": {"class_token": False}}
PREFIXES["no class token"]["global_pool"] = "avg"
everywhere = pytest.mark.parametrize("changes", PREFIXES.values(), ids=PREFIXES)


def unit_keys(key, prefix):
    """Unit vectors (n) of the patches' keys, averaged over heads, from keys (H, n, d)."""
    mean = sum(each for each in key) / len(key)
    return [F.normalize(row, dim=0) for row in mean[prefix:]]


def finished(model, x, size=None):
    """Logits of tokens, a list, where each patch counts as `size`."""
    tokens = torch.stack(x)[None]
    bias = None if size is None else torch.tensor(size, dtype=tokens.dtype).log()[None]
    return model.backbone.head(tokens, bias)[0]


def joined(x, size, groups, prefix):
    """Tokens and sizes after `groups`, lists of places of patches, have become one each: means weighted by size."""
    tokens, sizes = list(x[:prefix]), list(size[:prefix])
    for group in groups:
        total = sum(size[prefix + i] for i in group)
        tokens.append(sum(size[prefix + i] * x[prefix + i] for i in group) / total)
        sizes.append(total)
    return tokens, sizes


def clustered(unit, count, linkage):
    """Groups of places: the two nearest groups are joined until `count` are left."""
    groups = [[i] for i in range(len(unit))]

    def distance(a, b):
        found = [1 - float(unit[i] @ unit[j]) for i in a for j in b]
        return max(found) if linkage == "complete" else sum(found) / len(found)

    while len(groups) > count:
        pairs = [(distance(a, b), m, n) for m, a in enumerate(groups) for n, b in enumerate(groups) if m < n]
        _, m, n = min(pairs)
        groups[m] += groups.pop(n)
    return sorted(sorted(group) for group in groups)


def merging_rule(model, image, group_rule, fewer):
    """A model whose block `layer` turns patches into the groups that `group_rule` names; sizes weigh keys."""
    prefix = model.backbone.num_prefix_tokens
    x = list(model.backbone.embed(image[None])[0][0])
    size = [1.0] * len(x)
    for layer, (block, r) in enumerate(zip(model.model.blocks, fewer, strict=True), 1):
        y, _, key = attended(block, torch.stack(x), size if max(size) > 1 else None)
        x = list(y)
        if r:
            x, size = joined(x, size, group_rule(layer, unit_keys(key, prefix), r), prefix)
        x = [token + block.mlp(block.norm2(token)) for token in x]
    return finished(model, x, size)


@everywhere
@pytest.mark.parametrize("linkage", ["average", "complete"])
@torch.no_grad()
def test_atc_is_the_published_rule(changes, linkage):
    model = made("atc" if linkage == "average" else "atc-complete", 0.6, **changes)
    counts = model.patches_per_layer
    assert counts == (16, 10, 6, 4)
    fewer = [*(a - b for a, b in itertools.pairwise(counts)), 0]
    x = images(model)
    expected = [
        merging_rule(model, image, lambda _, unit, r: clustered(unit, len(unit) - r, linkage), fewer) for image in x
    ]
    assert torch.allclose(model(x), torch.stack(expected), atol=1e-6)


def energy_groups(layer, unit, r):
    margin = 0.75 - 0.75 * (layer - 1) / 4
    shifted = [[float(a @ b) - margin for b in unit] for a in unit]
    energy = [sum(v if v > 0 else math.exp(v) - 1 for v in row) / len(unit) for row in shifted]
    order = sorted(range(len(unit)), key=lambda i: -energy[i])
    dealt = order[: 2 * r] if layer > 2 else order
    one, other = dealt[::2], dealt[1::2]
    partner = {i: max(other, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in one}
    gone = sorted(one, key=lambda i: -float(unit[i] @ unit[partner[i]]))[:r]
    groups = {i: [i] for i in order if i not in gone}
    for i in gone:
        groups[partner[i]].append(i)
    return list(groups.values())


@everywhere
@torch.no_grad()
def test_pitome_is_the_published_rule(changes):
    model = made("pitome", 0.5, **changes)
    fewer = merges(model.schedule.counts)
    assert min(fewer) > 0
    x = images(model)
    expected = torch.stack([merging_rule(model, image, energy_groups, fewer) for image in x])
    assert torch.allclose(model(x), expected, atol=1e-9)


@everywhere
@torch.no_grad()
def test_tofu_is_the_published_rule(changes):
    model = made("tofu", 0.4, **changes)
    prefix, fewer = model.backbone.num_prefix_tokens, merges(model.schedule.counts)
    expected = []
    for image in (given := images(model)):
        x = list(model.backbone.embed(image[None])[0][0])
        for layer, (block, r) in enumerate(zip(model.model.blocks, fewer, strict=True), 1):
            y, _, key = attended(block, torch.stack(x))
            x = list(y)
            unit = [None] * prefix + unit_keys(key, prefix)
            even = [i for i in range(prefix, len(x)) if i % 2 == 0]
            odd = [i for i in range(prefix, len(x)) if i % 2 == 1]
            partner = {i: max(odd, key=lambda j, i=i, u=unit: float(u[i] @ u[j])) for i in even}
            chosen = sorted(even, key=lambda i, u=unit, p=partner: -float(u[i] @ u[p[i]]))
            gone = chosen[:r]
            rest = [i for i in even if i not in gone] if prefix else chosen[r:]
            rows = [*x[:prefix], *(x[i] for i in rest)]
            for j in odd:
                group = [x[j], *(x[i] for i in gone if partner[i] == j)]
                mean = sum(group) / len(group)
                longest = max(each.norm() for each in group)
                rows.append(x[j] if layer <= 3 else mean / mean.norm() * longest)
            x = [token + block.mlp(block.norm2(token)) for token in rows]
        expected.append(finished(model, x))
    assert min(fewer) > 0
    assert torch.allclose(model(given), torch.stack(expected), atol=1e-9)


def test_diffrate_prunes_and_merges_as_published():
    model = made("diffrate", 0.5)
    with torch.no_grad():
        for layer, numbers in enumerate([(13, 11), (10, 9), (8, 7)], 1):
            for which, number in enumerate(numbers):
                model.rates.logits[layer, which, 16 - number] = 20.0
    kept = model.kept(model.schedule.resolve(16))
    assert any(n > p > m for n, (p, m) in zip((16, *(m for _, m in kept)), kept, strict=False))
    given = images(model)
    expected = []
    for image in given:
        x = list(model.backbone.embed(image[None])[0][0])
        size = [1.0] * 17
        for block, (pruned, merged) in zip(model.model.blocks, kept, strict=True):
            y, maps, _ = attended(block, torch.stack(x), size)
            x, n = list(y), len(x) - 1
            if merged < n:
                paid = [float(maps[:, 0, 1 + i].mean()) for i in range(n)]
                order = sorted(range(n), key=lambda i, p=paid: -p[i])
                groups = {i: [i] for i in order[:merged]}
                sizes = {i: size[1 + i] for i in order[:merged]}
                for i in order[merged:pruned]:
                    alike = {j: float(F.cosine_similarity(x[1 + i], x[1 + j], dim=0)) for j in groups}
                    best = max(alike, key=alike.get)
                    groups[best].append(i)
                    sizes[best] += size[1 + i] * max(0.0, alike[best])
                x = [x[0], *(sum(x[1 + i] for i in group) / len(group) for group in groups.values())]
                size = [1.0, *sizes.values()]
            x = [token + block.mlp(block.norm2(token)) for token in x]
        expected.append(finished(model, x, size))
    with torch.no_grad():
        assert torch.allclose(model(given), torch.stack(expected), atol=1e-5)


def test_diffrate_learns_its_rates_towards_the_cost_with_the_weights_frozen():
    model = made("diffrate", 0.85).float()
    model.model.requires_grad_(False)
    model.mode = "soft"
    target = model.architecture().multiply_adds(model.patches_per_layer)
    optimizer = torch.optim.Adam(model.rates.parameters(), lr=0.1)
    x = images(model)
    misses = []
    for _ in range(40):
        model(x)
        misses.append(abs(float(model._costs[0]) - target))
        optimizer.zero_grad()
        model.own_loss(x, None).backward()
        assert model.rates.logits.grad[1:].abs().sum() > 0
        optimizer.step()
    assert misses[-1] < 0.25 * misses[0]
    model.mode = "hard"
    assert model.own_loss(x, None) == 0.0
    assert 0.95 * target < model.multiply_adds() <= target
    # the task's gradient reaches the rates through the masks
    model.mode = "soft"
    gradient = torch.autograd.grad(model(x).square().sum(), model.rates.logits)[0]
    assert gradient[1:].abs().sum() > 0 and gradient[0].abs().sum() == 0


@torch.no_grad()
def test_diffrate_masks_what_it_would_take_out():
    """A pass in mode soft and one in mode hard see the same patches where both keep the learned numbers."""
    model = made("diffrate", 0.5)
    model.rates.logits[:, 0, 4] = model.rates.logits[:, 1, 8] = 30.0
    kept = [(16, 16), (12, 8), (8, 8), (8, 8)]
    model.kept = lambda counts: tuple(kept)
    model._known = type("Known", (), {"kept": tuple(kept), "key": ()})()
    x = images(model)
    hard = model(x)
    model.mode = "soft"
    assert torch.allclose(model(x), hard, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 4}, {"global_pool": "avg"}], ids=["class", "registers", "mean"])
@torch.no_grad()
def test_evo_vit_is_the_published_rule(changes):
    """As published, a stage's other patches wait beside the blocks, and take what each block adds to their token."""
    model = made("evo-vit", 0.6, depth=6, **changes)
    prefix, counts = model.backbone.num_prefix_tokens, model.schedule.counts
    assert counts == (16, 16, *[counts[2]] * 4) and counts[2] < 13
    given = images(model)
    expected = []
    for image in given:
        x = model.backbone.embed(image[None])[0][0]
        paid = []
        for layer, block in enumerate(model.model.blocks, 1):
            if layer <= 2:
                x, maps, _ = attended(block, x)
                x = x + block.mlp(block.norm2(x))
                paid = [float(maps[:, 0, prefix + i].mean()) for i in range(16)]
                continue
            if layer in (3, 5):
                order = sorted(range(16), key=lambda i, p=paid: -p[i])
                slow, fast = order[: counts[2]], order[counts[2] :]
            # the token that stands for the others is made anew in every block
            weight = sum(paid[i] for i in fast)
            one = sum(paid[i] / weight * x[prefix + i] for i in fast)
            before = torch.stack([*x[:prefix], *(x[prefix + i] for i in slow), one])
            after, maps, _ = attended(block, before)
            after = after + block.mlp(block.norm2(after))
            x = x.clone()
            x[:prefix] = after[:prefix]
            for place, i in enumerate(slow):
                x[prefix + i] = after[prefix + place]
                paid[i] = (paid[i] + float(maps[:, 0, prefix + place].mean())) / 2
            for i in fast:
                x[prefix + i] += after[-1] - before[-1]
        expected.append(finished(model, list(x)))
    assert torch.allclose(model(given), torch.stack(expected), atol=1e-5)


def halting_model():
    model = made("a-vit", 0.5)
    with torch.no_grad():
        model.halting.center.fill_(4.0)
    return model


def read_of_the_class(states, scores):
    """The class token's states weighted by its scores, up to one in all; the last has what is left."""
    left, read = 1.0, 0.0
    for number, (state, score) in enumerate(zip(states, scores, strict=True), 1):
        ends = number == len(states) or 1 - left + score >= 0.99
        read = read + (left if ends else score) * state
        if ends:
            return read
        left = left - score
    return read


@torch.no_grad()
def test_a_vit_keeps_those_that_are_furthest_from_done():
    model, expected = halting_model(), []
    counts, given = model.schedule.counts, images(halting_model())
    assert counts[0] == 16 and all(a >= b for a, b in itertools.pairwise(counts)) and counts[-1] < 12
    for image in given:
        x = model.backbone.embed(image[None])[0][0]
        states, scores, total = [], [], [0.0] * 16
        for layer, block in enumerate(model.model.blocks, 1):
            x, _, _ = attended(block, x)
            x = x + block.mlp(block.norm2(x))
            score = (10 * x[:, 0] - 4).sigmoid()
            states.append(x[0])
            scores.append(float(score[0]))
            total = [before + float(new) for before, new in zip(total, score[1:], strict=True)]
            if layer < 4:
                stay = sorted(range(len(total)), key=lambda i, t=total: t[i])[: counts[layer]]
                x, total = torch.stack([x[0], *(x[1 + i] for i in stay)]), [total[i] for i in stay]
        expected.append(finished(model, [read_of_the_class(states, scores)]))
    assert torch.allclose(model(given), torch.stack(expected), atol=1e-5)


def test_a_vit_masks_those_that_are_done_and_adds_its_losses():
    model, x = halting_model(), images(halting_model())
    model.mode = "soft"
    found = model(x)
    logits, ponder, by_layer = [], [], [[] for _ in range(4)]
    for image in x:
        tokens = model.backbone.embed(image[None])[0][0]
        states, scores, total, going = [], [], [0.0] * 16, [True] * 16
        for layer, block in enumerate(model.model.blocks, 1):
            kept = torch.stack([tokens[0], *(tokens[1 + i] for i in range(16) if going[i])])
            kept, _, _ = attended(block, kept)
            kept = kept + block.mlp(block.norm2(kept))
            rows = iter(kept[1:])
            tokens = torch.stack([kept[0], *(next(rows) if going[i] else tokens[1 + i] for i in range(16))])
            score = (10 * tokens[:, 0] - 4).sigmoid()
            states.append(tokens[0])
            scores.append(score[0])
            for i in [i for i in range(16) if going[i]]:
                by_layer[layer - 1].append(score[1 + i])
                if layer == 4 or total[i] + score[1 + i] >= 0.99:
                    ponder.append(layer + 1 - total[i])
                    going[i] = False
                total[i] = total[i] + score[1 + i]
        logits.append(finished(model, [read_of_the_class(states, scores)]))
    assert torch.allclose(found, torch.stack(logits), atol=1e-5)
    share = torch.stack([sum(layer) / len(layer) for layer in by_layer])
    share = (share / share.sum()).clamp(0.01, 0.99)
    density = [math.exp(-((layer - sum(model.schedule.counts) / 16) ** 2) / 2) for layer in range(1, 5)]
    prior = sum(d / sum(density) * (math.log(d / sum(density)) - s.log()) for d, s in zip(density, share, strict=True))
    due = 5e-4 * sum(ponder) / len(ponder) + 1e-3 * prior / 4
    own = model.own_loss(x, None)
    assert own.item() == pytest.approx(due.item(), rel=1e-4)
    weight = model.model.blocks[0].attn.qkv.weight
    got, expected = (torch.autograd.grad(loss, weight)[0] for loss in (found.sum() + own, sum(logits).sum() + due))
    assert expected.abs().max() > 0 and torch.allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_a_vit_finds_the_middle_of_its_scores_on_the_first_batch_alone():
    model = made("a-vit", 0.5).train()
    model.mode = "soft"
    model(images(model))
    center = float(model.halting.center)
    assert center != 30 and model.halting.found
    model(2 * images(model))
    assert float(model.halting.center) == center


def informative(interpreter, whole, patch):
    """How informative a patch (D,) is beside the token of the whole image: the mean over heads, each a sigmoid."""
    width = len(patch)
    query, key = (
        layer(F.layer_norm(token, (width,))) for layer, token in ((interpreter.query, whole), (interpreter.key, patch))
    )
    each = width // interpreter.num_heads
    parts = [slice(head * each, (head + 1) * each) for head in range(interpreter.num_heads)]
    return sum((query[part] @ key[part] / math.sqrt(each)).sigmoid() for part in parts) / len(parts)


@everywhere
@torch.no_grad()
def test_ia_red2_is_the_published_rule(changes):
    model = made("ia-red2", 0.6, **changes)
    prefix, counts = model.backbone.num_prefix_tokens, model.patches_per_layer
    given = images(model)
    expected = []
    for image in given:
        x = model.backbone.embed(image[None])[0][0]
        for layer, block in enumerate(model.model.blocks, 1):
            x, _, _ = attended(block, x)
            x = x + block.mlp(block.norm2(x))
            if layer < 4 and counts[layer] < counts[layer - 1]:
                whole = x[0] if prefix else x.mean(dim=0)
                found = [float(informative(model.selector[str(layer)], whole, patch)) for patch in x[prefix:]]
                stay = sorted(range(len(found)), key=lambda i, f=found: -f[i])[: counts[layer]]
                x = torch.stack([*x[:prefix], *(x[prefix + i] for i in stay)])
        expected.append(finished(model, list(x)))
    assert torch.allclose(model(given), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_ia_red2_is_rewarded_as_published(turn, monkeypatch):
    """The interpreter whose turn it is draws, those before it are greedy, and its own best guess is the baseline."""
    model = made("ia-red2", 0.6)
    model.mode = "soft"
    # every third patch leaves, whatever its chance: both what is likely and what is not happens
    monkeypatch.setattr(torch, "bernoulli", lambda chance: (torch.arange(16) % 3 > 0).expand_as(chance).to(chance))
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(turn))
    x = images(model, 3)

    def rest(tokens, going, after, last):
        for block in model.model.blocks[after:last]:
            kept = torch.stack([tokens[0], *(tokens[1 + i] for i in range(16) if going[i])])
            kept, _, _ = attended(block, kept)
            rows = iter(kept := kept + block.mlp(block.norm2(kept)))
            tokens = torch.stack([next(rows), *(next(rows) if going[i] else tokens[1 + i] for i in range(16))])
        return tokens

    logits, guesses, drawn_shares, best_shares, chances = [], [], [], [], []
    for image in x:
        tokens, going, after = model.backbone.embed(image[None])[0][0], [True] * 16, 0
        for layer in range(1, turn + 2):
            tokens, after = rest(tokens, going, after, layer), layer
            found = [informative(model.selector[str(layer)], tokens[0], patch) for patch in tokens[1:].detach()]
            best = [here and bool(f > 0.5) for here, f in zip(going, found, strict=True)]
            before, going = going, best
        drawn = [here and i % 3 > 0 for i, here in enumerate(before)]
        chances.append(sum((f if d else 1 - f).log() for f, d, here in zip(found, drawn, before, strict=True) if here))
        logits.append(finished(model, [rest(tokens, drawn, after, 4)[0]]))
        guesses.append(int(finished(model, [rest(tokens, best, after, 4)[0]]).argmax()))
        drawn_shares.append(sum(drawn) / 16)
        best_shares.append(sum(best) / 16)
    drawn_right = [int(logit.argmax()) for logit in logits]
    # one image is right either way, one by its draw alone, one never
    answers = torch.tensor([guesses[0], drawn_right[1], -1])
    penalty = (3, 5, 8)[turn]
    due = 0.0
    for i, answer in enumerate(answers.tolist()):
        gained = 1 - drawn_shares[i] ** 2 if drawn_right[i] == answer else -penalty
        usual = 1 - best_shares[i] ** 2 if guesses[i] == answer else -penalty
        due = due - (gained - usual) * chances[i] / 3
    model.begin_step(answers)
    assert torch.allclose(model(x), torch.stack(logits), atol=1e-5)
    own = model.own_loss(x, None)
    assert own.item() == pytest.approx(due.item(), rel=1e-4)
    weights = [model.selector[str(turn + 1)].query.weight, model.selector[str(turn + 1)].key.bias]
    got, expected = (torch.autograd.grad(loss, weights) for loss in (own, due))
    for one, other in zip(got, expected, strict=True):
        assert other.abs().max() > 0 and torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_ia_red2_learns_from_the_reward_alone_which_patches_answer(monkeypatch):
    torch.manual_seed(0)
    model = made("ia-red2", 0.6).float().train()
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(0))

    def right(going, tokens, answers, penalty):
        """Right where the first four patches are all there; the others only cost."""
        return ia_red2.reward(going.float().mean(dim=1), going[:, :4].min(dim=1).values > 0, penalty)

    monkeypatch.setattr(model, "_reward", right)
    model.mode = "soft"
    x = images(model, 1).expand(32, -1, -1, -1)
    learned = list(model.selector["1"].parameters())
    optimizer = torch.optim.Adam(learned, 1e-2)
    for _ in range(80):
        model.begin_step(torch.zeros(32, dtype=torch.long))
        model(x)
        optimizer.zero_grad()
        model.own_loss(x, None).backward()
        optimizer.step()
    tokens = model.backbone.block(1, model.backbone.embed(x[:1])[0], None)
    assert set(model.choose(1, tokens, 4)[0].tolist()) == {0, 1, 2, 3}
    model.mode = "hard"
    assert model.own_loss(x, None) == 0.0


def test_a_reward_without_labels_is_for_the_dense_models_class():
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    images, targets = torch.zeros(2, 3, 8, 8), torch.tensor([0, 0])
    assert Batch(images, targets, targets, TeacherOutput(logits), labelled=False).answers.tolist() == [1, 0]
    assert Batch(images, targets, targets, TeacherOutput(logits), labelled=True).answers.tolist() == [0, 0]
    model = made("ia-red2")
    model.mode = "soft"
    with pytest.raises(SlimError, match="it cannot learn from label maps"):
        model.begin_step(torch.zeros(2, 8, 8))
