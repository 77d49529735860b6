"""How slim runs transformers' Vision Transformers."""

import dataclasses
import json
from pathlib import Path

import slimcli
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.beit.modeling_beit import BeitModelOutputWithPooling
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


def is_feature_backbone(model):
    """Whether `model` is one of those that transformers' `AutoBackbone` builds: they return feature maps alone."""
    return hasattr(model, "forward_with_filtered_kwargs")


class TransformersViT(slimcli.Backbone):
    """What the models have in common: their calling convention, and blocks of attention and MLP."""

    classifier_names = ("classifier", "cls_classifier", "distillation_classifier")
    normalisation = IMAGENET
    #: what the dense model's call returns, and the field of it that `head` gives
    output_kind, output_field = ImageClassifierOutput, "logits"
    #: whether the dense model gives what `head` does
    pools = True

    def __init__(self, model):
        super().__init__(model)
        # looked up here: torch.compile does not read a dataclass's fields
        self.output_fields = frozenset(field.name for field in dataclasses.fields(self.output_kind))

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

    def final_norm(self, tokens):
        return self.body.layernorm(tokens)

    @property
    def norms_maps(self):
        """Whether the feature maps of `AutoBackbone` are of normalised tokens."""
        return getattr(self.config, "apply_layernorm", True)

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

    def call(self, run, pixel_values=None, labels=None, output_hidden_states=None, return_dict=None, **others):
        self.check_call(pixel_values, others)
        if output_hidden_states or (output_hidden_states is None and self.model.config.output_hidden_states):
            raise slimcli.SlimError(
                "output_hidden_states: a slimmed model alone gives no features of its patches; "
                "slim_transformers.as_transformers(model) does"
            )
        unknown = [name for name, value in others.items() if value not in (None, False)]
        if unknown:
            raise slimcli.SlimError(f"{', '.join(unknown)}: not possible with a slimmed {type(self.model).__name__}")
        output = self.output(run(pixel_values), labels)
        return output.to_tuple() if return_dict is False else output

    def check_call(self, pixel_values, others):
        """Raise where a call asks for what no slimmed model has: `others` are its arguments by name."""
        asked = others.get("output_attentions")
        if asked or (asked is None and self.model.config.output_attentions):
            raise slimcli.SlimError(
                "output_attentions: the layers of a slimmed model attend to different numbers of patches"
            )
        if pixel_values is None:
            raise slimcli.SlimError("pixel_values are missing")

    def output(self, logits, labels=None, **features):
        """What the dense model returns, of `logits` (B, C) and those of `features` that it has."""
        found = {name: value for name, value in features.items() if name in self.output_fields}
        if "loss" in self.output_fields and labels is not None:
            found["loss"] = self.model.loss_function(labels, logits, self.model.config)
        return self.output_kind(**{self.output_field: logits if self.pools else None, **found})

    def heads(self, tokens):
        """What the dense model returns beside its logits, of tokens (B, P + N, D) after the last block, by name."""
        return {}

    def logits(self, output):
        if not self.pools:
            raise slimcli.SlimError(f"this {type(self.model).__name__} pools nothing: its output has no embedding")
        return output[self.output_field]


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

    output_kind = DeiTForImageClassificationWithTeacherOutput

    def head(self, tokens, key_bias=None):
        return sum(self.heads(tokens).values()) / 2

    def heads(self, tokens):
        tokens, model = self.body.layernorm(tokens), self.model
        return {
            "cls_logits": model.cls_classifier(tokens[:, 0]),
            "distillation_logits": model.distillation_classifier(tokens[:, 1]),
        }

    def embedding(self, tokens, key_bias=None):
        return self.body.layernorm(tokens)[:, :2].mean(dim=1)


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
    norms_maps = False

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
        tokens, norm = self.body.layernorm(tokens), getattr(self.body.pooler, "layernorm", None)
        if norm is None:
            return tokens[:, 0]
        return norm(slimcli.pool_mean(tokens[:, 1:], None if key_bias is None else key_bias[:, 1:]))


class Body:
    """A model without a classifier: what it pools is an image embedding."""

    compares_embeddings = True
    output_kind, output_field = BaseModelOutputWithPooling, "pooler_output"

    @property
    def pools(self):
        return self.body.pooler is not None

    def head(self, tokens, key_bias=None):
        return self.embedding(tokens, key_bias)


class ViTBody(Body, ViT):
    """ViTModel."""

    def embedding(self, tokens, key_bias=None):
        tokens = self.body.layernorm(tokens)
        return self.body.pooler(tokens) if self.pools else tokens[:, 0]


class DeiTBody(ViTBody, DeiT):
    """DeiTModel."""


class Dinov2Body(Body, Dinov2):
    """Dinov2Model, and Dinov2Backbone, whose own call gives feature maps alone."""

    head_reads_prefix_only = True

    @property
    def pools(self):
        return not is_feature_backbone(self.model)

    def embedding(self, tokens, key_bias=None):
        return self.body.layernorm(tokens)[:, 0]


class BeitBody(Body, Beit):
    """BeitModel, and BeitBackbone, whose own call gives feature maps alone."""

    output_kind = BeitModelOutputWithPooling


class _Vision(TransformersViT):
    """CLIP and SigLIP: an encoder under `vision_model`, or the model itself."""

    output_kind, output_field = BaseModelOutputWithPooling, "pooler_output"

    @property
    def body(self):
        return getattr(self.model, "vision_model", self.model)

    @property
    def blocks(self):
        return self.body.encoder.layers

    def final_norm(self, tokens):
        return self.body.post_layernorm(tokens)

    @property
    def compares_embeddings(self):
        return not self.has_classifier


class ClipVision(_Vision):
    """CLIPVisionModel: the class token, normalised."""

    normalisation = CLIP
    head_reads_prefix_only = True

    def embed(self, images):
        return self.body.pre_layrnorm(self.body.embeddings(images)), None

    def features(self, tokens):
        return tokens

    def head(self, tokens, key_bias=None):
        return self.body.post_layernorm(tokens[:, 0])


class ClipProjected(ClipVision):
    """CLIPVisionModelWithProjection: in the space that texts share."""

    output_kind, output_field = CLIPVisionModelOutput, "image_embeds"

    def head(self, tokens, key_bias=None):
        return self.model.visual_projection(super().head(tokens))


class ClipClassifier(ClipVision):
    """CLIPForImageClassification: the mean of the patches, not normalised."""

    output_kind, output_field = ImageClassifierOutput, "logits"
    head_reads_prefix_only = False

    def head(self, tokens, key_bias=None):
        return self.model.classifier(self.embedding(tokens, key_bias))

    def embedding(self, tokens, key_bias=None):
        return slimcli.pool_mean(tokens[:, 1:], None if key_bias is None else key_bias[:, 1:])


class SiglipVision(_Vision):
    """SiglipVisionModel: attention pooling; the mean of the patches where the model has no such head."""

    normalisation = HALF, HALF
    num_prefix_tokens = 0
    global_token = "mean"

    @property
    def pools(self):
        return self.config.vision_use_head

    def head(self, tokens, key_bias=None):
        tokens = self.body.post_layernorm(tokens)
        if not self.pools:
            return slimcli.pool_mean(tokens, key_bias)
        if key_bias is None:
            return self.body.head(tokens)
        with slimcli.biased_attention(key_bias, kernel=self.attention, where="the attention pooling"):
            return self.body.head(tokens)


class SiglipClassifier(SiglipVision):
    """SiglipForImageClassification: the mean of the patches."""

    output_kind, output_field = ImageClassifierOutput, "logits"
    pools = True

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
    transformers.ViTModel: ViTBody,
    transformers.DeiTModel: DeiTBody,
    transformers.Dinov2Model: Dinov2Body,
    transformers.Dinov2Backbone: Dinov2Body,
    transformers.Dinov2WithRegistersModel: Dinov2Body,
    transformers.Dinov2WithRegistersBackbone: Dinov2Body,
    transformers.BeitModel: BeitBody,
    transformers.BeitBackbone: BeitBody,
    transformers.CLIPVisionModel: ClipVision,
    transformers.CLIPVisionModelWithProjection: ClipProjected,
    transformers.CLIPForImageClassification: ClipClassifier,
    transformers.SiglipVisionModel: SiglipVision,
    transformers.SiglipForImageClassification: SiglipClassifier,
}
