"""The cost formula: multiply-adds of a model, dense or under a schedule, as in the paper. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from slimcli.schedule.counts import planned_counts, planned_rounds, rounds_of_pairs


@dataclass(frozen=True)
class Architecture:
    """What the cost formula needs to know of a model. Costs are multiply-adds.

    `block_weights` are the weights that each token is multiplied with in each block: 12 D^2 for an MLP ratio
    of 4. `head_fixed` and `head_per_patch` are the classifier's cost, for an image and for each patch it reads.
    `num_outputs` are the classes, 0 without a classifier. `key_value_weights` is the part of `block_weights` that makes
    keys and values, all a token needs that nothing reads after the block: 2 D^2, or all of `block_weights` where the
    block has no version that leaves the rest out.
    """

    embed_dim: int
    num_patches: int
    num_prefix_tokens: int
    patch_weights: int
    block_weights: tuple[int, ...]
    head_fixed: int
    head_per_patch: int = 0
    attention_dim: int | None = None
    num_outputs: int = 0
    key_value_weights: tuple[int, ...] | None = None
    head_reads_prefix_only: bool = False

    @property
    def depth(self) -> int:
        return len(self.block_weights)

    def block(self, layer: int, num_patches: int) -> int:
        """Multiply-adds of block `layer` on `num_patches` patches: W n + 2 n^2 D for n tokens (prefix included)."""
        n = num_patches + self.num_prefix_tokens
        return self.block_weights[layer - 1] * n + 2 * n * n * (self.attention_dim or self.embed_dim)

    def narrow_block(self, layer: int, num_patches: int, keep: int) -> int:
        """Multiply-adds of block `layer` where only its first `keep` of n tokens are read after it.

        K n + (W - K) keep + 2 n keep D for n tokens, where K makes keys and values.
        """
        n, weights = num_patches + self.num_prefix_tokens, self.block_weights[layer - 1]
        only_keys = self.key_value_weights[layer - 1] if self.key_value_weights else weights
        if only_keys == weights:
            return self.block(layer, num_patches)
        return only_keys * n + (weights - only_keys) * keep + 2 * n * keep * (self.attention_dim or self.embed_dim)

    def exact_savings(self, counts: Sequence[int] | None = None, life_layer: int | None = None) -> int:
        """Multiply-adds that go to tokens nothing reads any more, under the schedule N_1..N_L or of the dense model.

        In the last block these are the patches, where the classifier reads prefix tokens alone; with `life_layer`, in
        each later block also the patches that leave after it. They are needed there as keys and values only.
        """
        return sum(self.saved_in_block(layer, counts, life_layer) for layer in range(1, self.depth + 1))

    def saved_in_block(self, layer: int, counts: Sequence[int] | None = None, life_layer: int | None = None) -> int:
        """The part of `exact_savings` that falls to one block."""
        n = tuple(counts) if counts is not None else (self.num_patches,) * self.depth
        patches = n[layer - 1]
        if layer == self.depth:
            keep = 0 if self.head_reads_prefix_only else patches
        else:
            keep = n[layer] if life_layer is not None and layer > life_layer else patches
        if keep == patches:
            return 0
        return self.block(layer, patches) - self.narrow_block(layer, patches, keep + self.num_prefix_tokens)

    @property
    def embedding(self) -> int:
        """Multiply-adds of the patch embedding: N * 3 p^2 D."""
        return self.num_patches * self.patch_weights

    @property
    def life_head(self) -> int:
        """Multiply-adds of the folded life head: 2 D^2 + N D."""
        return 2 * self.embed_dim**2 + self.num_patches * self.embed_dim

    def multiply_adds(self, counts: Sequence[int] | None = None, planning: Planning | None = None) -> int:
        """Multiply-adds of one image under the schedule N_1..N_L; of the dense model without one.

        The life head counts only where the schedule drops a patch: otherwise it does not run. `planning` says what it
        does beside the paper's product.
        """
        n = tuple(counts) if counts is not None else (self.num_patches,) * self.depth
        total = self.embedding + self.head_fixed + self.head_per_patch * n[-1]
        total += sum(self.block(layer, patches) for layer, patches in enumerate(n, 1))
        if n[-1] == n[0]:
            return total
        if planning is not None:
            total += planning.multiply_adds(n, self.embed_dim, self.num_prefix_tokens)
        return total + self.life_head


@dataclass(frozen=True)
class Planning:
    """What the life head does at the life layer beside the paper's product: see `slimcli.life`.

    `similarity_dim` and `context_dim` are the widths of its projection and of its transformer block, 0 without;
    `compares`: patches are compared with each other, by their tokens where there is no projection; `ranks`: that also
    says which of them leave; `adds`: those that leave are added to others, by one product each time. `pairs`: half of
    them are compared with the other half instead, in several rounds.
    """

    similarity_dim: int = 0
    context_dim: int = 0
    compares: bool = True
    ranks: bool = True
    adds: bool = False
    pairs: bool = False

    def multiply_adds(self, counts: Sequence[int], embed_dim: int, num_prefix_tokens: int) -> int:
        """Multiply-adds of one image under the schedule N_1..N_L."""
        patches, width = counts[0], self.context_dim
        tokens = patches + num_prefix_tokens
        # the reduction, queries, keys, values, their projection and the MLP; attention; the score
        total = tokens * (embed_dim * width + 8 * width**2) + 2 * tokens**2 * width + patches * width
        if not self.compares:
            return total
        total += patches * self.similarity_dim * (embed_dim + width)
        channels = self.similarity_dim or embed_dim
        if self.pairs:
            for n, stay in itertools.pairwise(planned_counts(counts)):
                # the means and their squares, the products of the two halves, and what they weigh; two channels more
                # are where the patches lie
                halves = [(k // 2, k - k // 2) for k in rounds_of_pairs(n, stay)[:-1]]
                total += sum(2 * (a + b) * (channels + 2) + a * b * (channels + 5) for a, b in halves)
        else:
            for n, *later in planned_rounds(counts):
                total += (n - later[-1]) * later[0] * channels + (n**2 * (channels + 1) if self.ranks else 0)
        for n, stay in itertools.pairwise(dict.fromkeys(counts)):
            total += (n - stay) * (num_prefix_tokens + stay) * embed_dim if self.adds else 0
        return total
