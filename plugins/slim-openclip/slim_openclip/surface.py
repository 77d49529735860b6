"""A slimmed vision tower with all that the dense one of open_clip's gives, back in the model that it comes from."""

import slimcli
import torch
from timm.models._features import feature_take_indices
from torch import nn

from slim_openclip.backbone import Tower


class OpenClipTower(nn.Module):
    """A slimmed tower, called as the dense one of open_clip's; see `slim_openclip.as_openclip`.

    What it has not itself, such as `image_size`, is the dense tower's.
    """

    def __init__(self, slimmed, patches="all"):
        super().__init__()
        if not isinstance(slimmed, slimcli.SlimModel) or not isinstance(slimmed.backbone, Tower):
            raise slimcli.SlimError(
                "as_openclip takes a slimmed tower of open_clip's, slimcli.slim(clip.visual), not a "
                f"{type(getattr(slimmed, 'model', slimmed)).__name__}"
            )
        if patches not in ("all", "living"):
            raise slimcli.SlimError(f"patches = {patches!r} is not possible: expected all or living")
        self.slimmed, self.patches = slimmed, patches

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.slimmed.backbone.visual, name)

    def forward(self, images):
        """Images (B, 3, H, W) to embeddings (B, E); with `output_tokens` also the tokens, as the dense tower."""
        if not getattr(self, "output_tokens", False):
            return self.slimmed.embedding(images)
        depth = self.slimmed.backbone.depth
        embedding, (tokens,) = self.slimmed.logits_and_tokens(images, [depth], self.patches, embedding=True)
        return embedding, self.slimmed.backbone.pooled_tokens(tokens)

    def forward_intermediates(
        self,
        x,
        indices=None,
        stop_early=False,
        normalize_intermediates=False,
        intermediates_only=False,
        output_fmt="NCHW",
        output_extra_tokens=False,
    ):
        """The dense tower's call. With `patches="living"` also `image_positions` (B, n), places in raster order."""
        if output_fmt not in ("NCHW", "NLC"):
            raise slimcli.SlimError(f"output_fmt = {output_fmt!r}: expected NCHW or NLC")
        if self.patches == "living" and output_fmt != "NLC":
            raise slimcli.SlimError(f'output_fmt = {output_fmt!r}: patches="living" are no map, expected NLC')
        taken, _ = feature_take_indices(self.slimmed.backbone.depth, indices)
        tokens, embedding = self._run(x, sorted(set(taken)), stop_early, intermediates_only)
        backbone = self.slimmed.backbone
        prefix = backbone.num_prefix_tokens
        if normalize_intermediates:
            tokens = [backbone.final_norm(one) for one in tokens]
        patches = [one[:, prefix:] for one in tokens]
        if output_fmt == "NCHW":
            patches = [one.transpose(1, 2).unflatten(2, backbone.grid_size).contiguous() for one in patches]
        output = {"image_intermediates": patches}
        if prefix and output_extra_tokens:
            output["image_intermediates_prefix"] = [one[:, :prefix] for one in tokens]
        if self.patches == "living":
            output["image_positions"] = self.slimmed.living_patches
        if not intermediates_only:
            output["image_features"] = embedding
        return output

    def _run(self, images, blocks, stop_early, intermediates_only):
        """Tokens after `blocks`, from 0, and the embedding, which with `stop_early` is that of the last of them."""
        slimmed, backbone = self.slimmed, self.slimmed.backbone
        if stop_early and self.patches == "all":
            # not known before the end is who lives to it: only where all are given is there anything to leave out
            found = slimmed.forward_intermediates(images, blocks, True, False, True, "NLC", True)
            tokens = [torch.cat((one[1], one[0]), dim=1) if isinstance(one, tuple) else one for one in found]
        else:
            layers = [block + 1 for block in blocks]
            embedding, tokens = slimmed.logits_and_tokens(images, layers, self.patches, embedding=True)
        if stop_early:
            embedding = None if intermediates_only else backbone.embedding(tokens[-1])
        return tokens, embedding

    def no_weight_decay(self):
        """Names of this tower's parameters that should not decay: the dense tower's."""
        visual = self.slimmed.backbone.visual
        names = visual.no_weight_decay() if hasattr(visual, "no_weight_decay") else ()
        wrapped = "" if visual is self.slimmed.model else "visual."
        return {f"slimmed.model.{wrapped}{name}" for name in names}

    def set_grad_checkpointing(self, enable=True):
        """Compute blocks again in the backward pass instead of keeping what they made."""
        self.slimmed.set_grad_checkpointing(enable)
