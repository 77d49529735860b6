"""open_clip's vision towers by name, alone or with class texts as a zero-shot classifier."""

from functools import partial

import open_clip
import slimcli
import torch
from torch import nn
from torch.nn import functional as F


class ImageTower(nn.Module):
    """A vision tower: images (B, 3, H, W) to embeddings (B, E), or with class embeddings (C, E) to logits (B, C)."""

    def __init__(self, visual, class_embeddings=None, logit_scale=100.0):
        super().__init__()
        self.visual = visual
        self.register_buffer("class_embeddings", class_embeddings)
        self.register_buffer("logit_scale", None if class_embeddings is None else torch.tensor(float(logit_scale)))

    def classify(self, embedding):
        """Embeddings (B, E) to logits (B, C): the scaled cosine to the embedding of each class's texts."""
        if self.class_embeddings is None:
            return embedding
        return self.logit_scale * F.normalize(embedding, dim=-1) @ self.class_embeddings.t()

    def forward(self, images):
        return self.classify(self.visual(images))


def build_model(name, pretrained, args):
    """The tower of the open_clip model called `name`.

    `args`: img_size; checkpoint, a file or one of open_clip's tags; class_texts, for each class a text or several.
    The name `custom` takes embed_dim, vision_cfg and text_cfg as open_clip's own configurations have them.
    """
    args = dict(args)
    size, checkpoint, texts = args.pop("img_size", None), args.pop("checkpoint", None), args.pop("class_texts", None)
    # how many classes there are is what the texts say
    args.pop("num_classes", None)
    if name != "custom" and name not in open_clip.list_models():
        raise slimcli.SlimError(f"openclip:{name}: open_clip has no such model; open_clip.list_models() names them")
    if pretrained and checkpoint is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not tags:
            raise slimcli.SlimError(f"openclip:{name} has no pretrained weights: give a checkpoint in model.args")
        checkpoint = tags[0]
    try:
        if name == "custom":
            if size is not None:
                args["vision_cfg"] = {**args["vision_cfg"], "image_size": size}
            clip = open_clip.CLIP(**args)
            if checkpoint is not None:
                open_clip.load_checkpoint(clip, checkpoint)
        else:
            clip = open_clip.create_model(name, pretrained=checkpoint, force_image_size=size, **args)
    except (RuntimeError, OSError, TypeError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise slimcli.SlimError(f"openclip:{name} cannot be built: {first}") from error
    clip.eval()
    if texts is None:
        return ImageTower(clip.visual).eval()
    tokenizer = open_clip.SimpleTokenizer() if name == "custom" else open_clip.get_tokenizer(name)
    return ImageTower(clip.visual, class_embeddings(clip, tokenizer, texts), clip.logit_scale.detach().exp()).eval()


@torch.no_grad()
def class_embeddings(clip, tokenizer, texts):
    """One embedding of length 1 for each class (C, E): the mean of its texts' embeddings."""
    length = getattr(clip, "context_length", 77)
    found = []
    for one in texts:
        tokens = tokenizer([one] if isinstance(one, str) else list(one), context_length=length)
        found.append(F.normalize(F.normalize(clip.encode_text(tokens), dim=-1).mean(dim=0), dim=-1))
    return torch.stack(found)


SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def small_models():
    """Builders of small random towers."""

    def build(classes=None, **vision):
        args = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], **vision}, "class_texts": classes}
        return build_model("custom", False, args)

    def timm_tower():
        tower = build(timm_model_name="vit_tiny_patch16_224", timm_pool="token", timm_proj="linear", image_size=64)
        # open_clip passes no depth on to timm
        trunk = tower.visual.trunk
        trunk.blocks = trunk.blocks[: SMALL["vision_cfg"]["layers"]]
        return tower

    return {
        "class token": build,
        "class token, zero-shot": partial(build, classes=["a cat", "a dog", ["a bird", "a parrot"]]),
        "average pooling": partial(build, pool_type="avg"),
        "average pooling, norm after it": partial(build, pool_type="avg", final_ln_after_pool=True),
        "attentional pooling": partial(build, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
        "LayerScale": partial(build, ls_init_value=0.1),
        "norms and scales in the attention": partial(
            build, qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
        ),
        "timm tower": timm_tower,
    }
