"""How slim runs a TinyViT."""

from slimcli import Backbone


class TinyBackbone(Backbone):
    head_reads_prefix_only = True

    @property
    def image_size(self):
        return self.model.img_size, self.model.img_size

    @property
    def blocks(self):
        return self.model.layers

    def embed(self, images):
        return self.model.embed(images), None

    def head(self, tokens, key_bias=None):
        return self.model.head(self.model.norm(tokens)[:, 0])
