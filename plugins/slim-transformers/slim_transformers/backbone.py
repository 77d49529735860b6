"""How slim runs transformers' Vision Transformers."""

import json
from pathlib import Path

import slimcli
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPVisionModelOutput
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacherOutput

from slim_transformers.blocks import has_hooks, narrow, plain_parts

HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
#: PIL's numbers for ways to resample
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def find_backbone(model):
    """The adapter for `model`; None if it is not one of transformers' that this plugin serves."""
    adapter = BACKBONES.get(type(model))
    if adapter is None:
        return None
    running = model.config._attn_implementation
    if running != "sdpa":
        raise slimcli.SlimError(
            f"{type(model).__name__} runs its attention as {running!r}: "
            'slim needs torch\'s, model.set_attn_implementation("sdpa")'
        )
    return adapter(model)


class TransformersViT(slimcli.Backbone):
    """What the models have in common: their calling convention, and blocks of attention and MLP."""

    classifier_names = ("classifier", "cls_classifier", "distillation_classifier")
    normalisation = IMAGENET

    @property
    def body(self):
        """The model below the classifier."""
        return getattr(self.model, self.model.base_model_prefix, self.model)

    @property
    def config(self):
        return self.body.config

    @property
    def image_size(self):
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def blocks(self):
        return self.body.layers

    @property
    def has_classifier(self):
        return getattr(self.model, "num_labels", 0) > 0 and any(
            hasattr(self.model, name) for name in self.classifier_names
        )

    def rebuilt_as(self, name, args):
        """By its model type and configuration, so that a model folder needs neither the hub nor another folder."""
        config = self.model.config
        if name == f"hf:{config.model_type}":
            return super().rebuilt_as(name, args)
        left_out = ("model_type", "transformers_version", "dtype", "torch_dtype", "auto_map")
        fields = {key: value for key, value in config.to_diff_dict().items() if key not in left_out and key[:1] != "_"}
        fields["architectures"] = [type(self.model).__name__]
        return {"name": f"hf:{config.model_type}", "args": fields}

    def embed(self, images):
        return self.body.embeddings(images), None

    def block(self, layer, tokens, positions=None):
        return self.blocks[layer - 1](tokens, None)

    def narrows(self, layer):
        return plain_parts(self.blocks[layer - 1]) is not None

    def narrow_block(self, layer, tokens, positions, keep, key_bias=None, reading=None):
        parts = plain_parts(self.blocks[layer - 1])
        if positions is not None or parts is None or has_hooks(self.blocks[layer - 1], parts):
            return super().narrow_block(layer, tokens, positions, keep, key_bias, reading)
        return narrow(parts, tokens, keep, key_bias, reading, self.attention)

    def preprocessing(self):
        mean, std = self.normalisation
        chosen = {**super().preprocessing(), "mean": mean, "std": std}
        file = Path(self.model.config.name_or_path) / "preprocessor_config.json"
        if self.model.config.name_or_path and file.is_file():
            config = json.loads(file.read_text())
            chosen["mean"], chosen["std"] = config.get("image_mean", mean), config.get("image_std", std)
            chosen["interpolation"] = RESAMPLE.get(config.get("resample"), "bicubic")
        return chosen

    def call(
        self,
        run,
        pixel_values=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        **others,
    ):
        config = self.model.config
        for name, asked in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
            if asked or (asked is None and getattr(config, name, False)):
                raise slimcli.SlimError(f"{name}: the layers of a slimmed model have different numbers of patches")
        unknown = [name for name, value in others.items() if value not in (None, False)]
        if unknown:
            raise slimcli.SlimError(f"{', '.join(unknown)}: not possible with a slimmed {type(self.model).__name__}")
        if pixel_values is None:
            raise slimcli.SlimError("pixel_values are missing")
        logits = run(pixel_values)
        loss = None if labels is None else self.model.loss_function(labels, logits, config)
        output = self.output(logits, loss)
        return output.to_tuple() if return_dict is False else output

    def output(self, logits, loss):
        return ImageClassifierOutput(loss=loss, logits=logits)

    def logits(self, output):
        return output.logits


class ViT(TransformersViT):
    """ViTForImageClassification."""

    normalisation = HALF, HALF
    head_reads_prefix_only = True

    def head(self, tokens, key_bias=None):
        return self.model.classifier(self.embedding(tokens))

    def embedding(self, tokens, key_bias=None):
        return self.body.layernorm(tokens)[:, 0]


class DeiT(ViT):
    """DeiTForImageClassification: a distillation token beside the class token."""

    normalisation = IMAGENET
    num_prefix_tokens = 2


class DeiTWithTeacher(DeiT):
    """DeiTForImageClassificationWithTeacher: the mean of two classifiers."""

    def head(self, tokens, key_bias=None):
        tokens = self.body.layernorm(tokens)
        return (self.model.cls_classifier(tokens[:, 0]) + self.model.distillation_classifier(tokens[:, 1])) / 2

    def embedding(self, tokens, key_bias=None):
        return self.body.layernorm(tokens)[:, :2].mean(dim=1)

    def output(self, logits, loss):
        return DeiTForImageClassificationWithTeacherOutput(logits=logits)


class Dinov2(TransformersViT):
    """Dinov2ForImageClassification: class token and mean of the patches side by side."""

    @property
    def num_prefix_tokens(self):
        return 1 + getattr(self.config, "num_register_tokens", 0)

    @property
    def blocks(self):
        return self.body.encoder.layer

    def head(self, tokens, key_bias=None):
        return self.model.classifier(self.embedding(tokens, key_bias))

    def embedding(self, tokens, key_bias=None):
        tokens, first = self.body.layernorm(tokens), self.pooled_from
        mean = slimcli.pool_mean(tokens[:, first:], None if key_bias is None else key_bias[:, first:])
        return torch.cat((tokens[:, 0], mean), dim=1)

    @property
    def pooled_from(self):
        return 1


class Dinov2WithRegisters(Dinov2):
    """Dinov2WithRegistersForImageClassification."""

    @property
    def pooled_from(self):
        return self.num_prefix_tokens


class Beit(TransformersViT):
    """BeitForImageClassification. A patch's position is its place in the dense sequence."""

    normalisation = HALF, HALF

    def __init__(self, model):
        super().__init__(model)
        self.head_reads_prefix_only = not self.config.use_mean_pooling
        biases = [layer.relative_position_bias for layer in self.blocks] + [self.body.shared_position_bias]
        for bias in biases:
            if bias is not None:
                # transformers keeps the first index it makes: it must not be one without numbers
                bias.generate_relative_position_index(self.window)

    @property
    def window(self):
        return tuple(length // self.config.patch_size for length in self.image_size)

    def embed(self, images):
        tokens = self.body.embeddings(images)
        return tokens, torch.arange(1, tokens.shape[1], device=tokens.device)[None]

    def block(self, layer, tokens, positions=None):
        return self.related(layer, tokens, positions, None)

    def masked_block(self, layer, tokens, positions, key_bias):
        return self.related(layer, tokens, positions, key_bias)

    def related(self, layer, tokens, positions, key_bias):
        places = torch.nn.functional.pad(positions, (1, 0))
        shared = self.body.shared_position_bias
        mask = None if shared is None else shared(self.window, dim_size=tokens.shape[1])
        with slimcli.biased_attention(key_bias, places, self.attention, f"block {layer}"):
            return self.blocks[layer - 1](tokens, mask, resolution=self.image_size)

    def head(self, tokens, key_bias=None):
        return self.model.classifier(self.embedding(tokens, key_bias))

    def embedding(self, tokens, key_bias=None):
        tokens, norm = self.body.layernorm(tokens), self.body.pooler.layernorm
        if norm is None:
            return tokens[:, 0]
        return norm(slimcli.pool_mean(tokens[:, 1:], None if key_bias is None else key_bias[:, 1:]))


class _Vision(TransformersViT):
    """CLIP and SigLIP: an encoder under `vision_model`, or the model itself."""

    @property
    def body(self):
        return getattr(self.model, "vision_model", self.model)

    @property
    def blocks(self):
        return self.body.encoder.layers

    def output(self, logits, loss):
        if self.has_classifier:
            return ImageClassifierOutput(loss=loss, logits=logits)
        return BaseModelOutputWithPooling(last_hidden_state=None, pooler_output=logits)

    def logits(self, output):
        return output.logits if self.has_classifier else output.pooler_output

    @property
    def compares_embeddings(self):
        return not self.has_classifier


class ClipVision(_Vision):
    """CLIPVisionModel: the class token, normalised."""

    normalisation = CLIP
    head_reads_prefix_only = True

    def embed(self, images):
        return self.body.pre_layrnorm(self.body.embeddings(images)), None

    def head(self, tokens, key_bias=None):
        return self.body.post_layernorm(tokens[:, 0])


class ClipProjected(ClipVision):
    """CLIPVisionModelWithProjection: in the space that texts share."""

    def head(self, tokens, key_bias=None):
        return self.model.visual_projection(super().head(tokens))

    def output(self, logits, loss):
        return CLIPVisionModelOutput(image_embeds=logits)

    def logits(self, output):
        return output.image_embeds


class ClipClassifier(ClipVision):
    """CLIPForImageClassification: the mean of the patches, not normalised."""

    head_reads_prefix_only = False

    def head(self, tokens, key_bias=None):
        return self.model.classifier(self.embedding(tokens, key_bias))

    def embedding(self, tokens, key_bias=None):
        return slimcli.pool_mean(tokens[:, 1:], None if key_bias is None else key_bias[:, 1:])


class SiglipVision(_Vision):
    """SiglipVisionModel: attention pooling."""

    normalisation = HALF, HALF
    num_prefix_tokens = 0
    global_token = "mean"

    def head(self, tokens, key_bias=None):
        tokens = self.body.post_layernorm(tokens)
        if key_bias is None:
            return self.body.head(tokens)
        with slimcli.biased_attention(key_bias, kernel=self.attention, where="the attention pooling"):
            return self.body.head(tokens)


class SiglipClassifier(SiglipVision):
    """SiglipForImageClassification: the mean of the patches."""

    def head(self, tokens, key_bias=None):
        return self.model.classifier(self.embedding(tokens, key_bias))

    def embedding(self, tokens, key_bias=None):
        return slimcli.pool_mean(self.body.post_layernorm(tokens), key_bias)


BACKBONES = {
    transformers.ViTForImageClassification: ViT,
    transformers.DeiTForImageClassification: DeiT,
    transformers.DeiTForImageClassificationWithTeacher: DeiTWithTeacher,
    transformers.Dinov2ForImageClassification: Dinov2,
    transformers.Dinov2WithRegistersForImageClassification: Dinov2WithRegisters,
    transformers.BeitForImageClassification: Beit,
    transformers.CLIPVisionModel: ClipVision,
    transformers.CLIPVisionModelWithProjection: ClipProjected,
    transformers.CLIPForImageClassification: ClipClassifier,
    transformers.SiglipVisionModel: SiglipVision,
    transformers.SiglipForImageClassification: SiglipClassifier,
}
