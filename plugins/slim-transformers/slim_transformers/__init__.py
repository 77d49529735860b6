"""slim plugin for Hugging Face transformers. transformers itself is imported when a model asks for it."""

import sys

import slimcli

PREFIX = "hf:"


@slimcli.hookimpl
def slim_backbone_names():
    return {
        "hf:FOLDER, hf:OWNER/MODEL": "ViT, DeiT, DINOv2, BEiT, CLIP and SigLIP vision models of transformers",
        "hf:TYPE": "the same with random weights, by their model type (vit, deit, dinov2, beit, ...)",
    }


@slimcli.hookimpl
def slim_build_model(name, pretrained, args):
    if not name.startswith(PREFIX):
        return None
    from slim_transformers.build import build_model

    return build_model(name.removeprefix(PREFIX), pretrained, args)


@slimcli.hookimpl
def slim_backbone(model):
    # a model of transformers' cannot be here before transformers is
    if "transformers" not in sys.modules:
        return None
    from slim_transformers.backbone import find_backbone

    return find_backbone(model)


@slimcli.hookimpl
def slim_check_models():
    from slim_transformers.build import small_models

    return small_models()


def as_transformers(slimmed, *, patches="all", out_indices=None):
    """A slimmed model in the place of its dense one: `clip.vision_model = as_transformers(slimmed)`.

    It gives what the dense model gives, and in its shapes: `last_hidden_state` and `output_hidden_states` with all N
    patches in raster order, those that left put back as `slimmed.restoring` says; `pooler_output`; `logits`.

    Args:
        slimmed: what `slimcli.slim` made of a model of transformers'.
        patches: "all", or "living": the last and all hidden states are (B, P + n, D), of the n patches that live to
            the end alone, and the output has their places in raster order, `patch_positions` (B, n).
        out_indices: return feature maps (B, D, rows, columns) after these blocks, from 1, as `AutoBackbone` does; 0 is
            what enters the first. By default those of a dense backbone; None for other models.

    Raises:
        SlimError: for a model that is not transformers', blocks that it has not, and, when it is called, a method that
            does not say where its patches go.
    """
    from slim_transformers.surface import TransformersTower

    return TransformersTower(slimmed, patches, out_indices)


def living_inputs(inputs, patch_positions, image_token_id):
    """What a vision-language model is called with, where its language model is to get living patches alone.

    Args:
        inputs: `input_ids` (B, T), with a placeholder for each patch of each image, and what goes with them.
        patch_positions: (images, n), from `model.get_image_features(pixel_values)` with a tower of
            `as_transformers(slimmed, patches="living")`.
        image_token_id: the number of the placeholder.

    Returns:
        The same with n placeholders an image, in every tensor (B, T), and `position_ids`: those of the whole sequence.

    Raises:
        SlimError: where rows have different numbers of images, or images other numbers of placeholders than patches.
    """
    from slim_transformers.surface import living_inputs as shortened

    return shortened(inputs, patch_positions, image_token_id)
