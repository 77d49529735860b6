"""A slimmed model with all that transformers' dense one gives: hidden states, feature maps, a place in others."""

import slimcli
import torch
from torch import nn
from transformers.modeling_outputs import BackboneOutput

from slim_transformers.backbone import TransformersViT, is_feature_backbone

#: arguments that change what a tower computes, and that a slimmed one has not
NOT_POSSIBLE = ("interpolate_pos_encoding", "bool_masked_pos", "attention_mask")


class TransformersTower(nn.Module):
    """A slimmed model, called as the dense one of transformers'; see `slim_transformers.as_transformers`.

    What it has not itself, such as `config` and `dtype`, is the dense model's.
    """

    def __init__(self, slimmed, patches="all", out_indices=None):
        super().__init__()
        if not isinstance(slimmed, slimcli.SlimModel) or not isinstance(slimmed.backbone, TransformersViT):
            raise slimcli.SlimError(
                f"as_transformers takes a slimmed model of transformers', slimcli.slim(model), not a "
                f"{type(getattr(slimmed, 'model', slimmed)).__name__}"
            )
        if patches not in ("all", "living"):
            raise slimcli.SlimError(f"patches = {patches!r} is not possible: expected all or living")
        self.slimmed, self.patches = slimmed, patches
        dense, backbone = slimmed.model, slimmed.backbone
        if is_feature_backbone(dense) and out_indices is None:
            out_indices = dense.out_indices
        self.stage_names = ["stem", *(f"stage{layer}" for layer in range(1, backbone.depth + 1))]
        self.num_features = [backbone.embed_dim] * (backbone.depth + 1)
        self.out_indices = None if out_indices is None else _places(out_indices, backbone.depth)
        if self.out_indices is not None:
            if patches == "living":
                raise slimcli.SlimError('out_indices give maps of all patches: patches="living" is not possible')
            self.out_features = [self.stage_names[index] for index in self.out_indices]
            self.channels = [backbone.embed_dim] * len(self.out_indices)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.slimmed.model, name)

    def forward(self, pixel_values=None, labels=None, output_hidden_states=None, return_dict=None, **others):
        """Images (B, 3, H, W) to what the dense model returns of them.

        `output_hidden_states`, True, a number or a list of them, selects as in transformers: 0 is what enters the
        first block. With `patches="living"` the output has `patch_positions` (B, n), places in raster order.
        """
        backbone = self.slimmed.backbone
        backbone.check_call(pixel_values, others)
        if asked := [name for name in NOT_POSSIBLE if others.get(name) not in (None, False)]:
            raise slimcli.SlimError(f"{asked[0]}: not possible with a slimmed {type(self.slimmed.model).__name__}")
        if output_hidden_states is None:
            output_hidden_states = self.slimmed.model.config.output_hidden_states
        depth = backbone.depth
        shown = _selected(output_hidden_states, depth)
        layers = sorted({*shown, *(self.out_indices or ()), depth})
        logits, tokens = self.slimmed.logits_and_tokens(pixel_values, layers, self.patches)
        after = dict(zip(layers, tokens, strict=True))
        features = {}
        if shown:
            features["hidden_states"] = tuple(after[n] if n in shown else None for n in range(depth + 1))
        if self.out_indices is not None:
            maps = tuple(self._map(after[index]) for index in self.out_indices)
            # a neck that brings the maps to four sizes
            neck = getattr(self.slimmed.model, "fpn", None)
            maps = maps if neck is None else neck(maps)
            output = BackboneOutput(feature_maps=maps, **features)
        else:
            features |= {"last_hidden_state": backbone.features(after[depth]), **backbone.heads(after[depth])}
            output = backbone.output(logits, labels, **features)
        if self.patches == "living":
            output.patch_positions = self.slimmed.living_patches
        return output.to_tuple() if return_dict is False else output

    #: parents call a backbone by this name
    forward_with_filtered_kwargs = forward

    def _map(self, tokens):
        """Tokens (B, P + N, D) as the feature map of transformers' backbones: (B, D, rows, columns), normalised."""
        backbone, config = self.slimmed.backbone, self.slimmed.model.config
        if backbone.norms_maps:
            tokens = backbone.final_norm(tokens)
        if not getattr(config, "reshape_hidden_states", True):
            return tokens
        patches = tokens[:, backbone.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, backbone.grid_size).contiguous()


def _places(indices, depth):
    indices = [indices] if isinstance(indices, int) else list(indices)
    places = [index + depth + 1 if index < 0 else index for index in indices]
    if wrong := [index for index, place in zip(indices, places, strict=True) if not 0 <= place <= depth]:
        raise slimcli.SlimError(
            f"out_indices = {wrong[0]}: the model has blocks 1 to {depth}, and 0 for what enters them"
        )
    return places


def _selected(asked, depth):
    """The hidden states, from 0 to `depth`, that `output_hidden_states` selects; those that are not there are not."""
    if asked is None or isinstance(asked, bool):
        return set(range(depth + 1)) if asked else set()
    numbers = [asked] if isinstance(asked, int) else asked
    return {number % (depth + 1) for number in numbers if -depth - 1 <= number <= depth}


def living_inputs(inputs, patch_positions, image_token_id):
    """`inputs` of a language model, with placeholders of the living patches alone, at the positions that they had.

    See `slim_transformers.living_inputs`.
    """
    tokens = inputs["input_ids"]
    placeholder = tokens == image_token_id
    images, in_row = len(patch_positions), placeholder.sum(dim=1)
    total = int(in_row.sum())
    if images == 0 or total % images or len(in_row.unique()) > 1 or images % len(tokens):
        raise slimcli.SlimError(
            f"input_ids have {in_row.tolist()} image tokens a row for {images} images: expected as many images, each "
            "with all of its patches, in every row"
        )
    num_patches = total // images
    if int(patch_positions.max()) >= num_patches:
        raise slimcli.SlimError(
            f"input_ids have {num_patches} image tokens an image, and patch {int(patch_positions.max())} lives: "
            "expected one for each of the dense model's patches"
        )
    lives = torch.zeros(images, num_patches, dtype=torch.bool, device=tokens.device)
    lives.scatter_(1, patch_positions.to(tokens.device), True)
    keep = torch.ones_like(placeholder).masked_scatter(placeholder, lives.flatten())
    rows, length = tokens.shape
    mask = inputs.get("attention_mask")
    if inputs.get("position_ids") is not None:
        positions = inputs["position_ids"].expand(rows, -1)
    elif mask is not None:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    else:
        positions = torch.arange(length, device=tokens.device).expand(rows, -1)
    sequences = {
        name: value[keep].reshape(rows, -1)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.shape == tokens.shape
    }
    return {**inputs, **sequences, "position_ids": positions[keep].reshape(rows, -1)}
