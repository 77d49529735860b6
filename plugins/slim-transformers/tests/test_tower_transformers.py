"""A slimmed model in the place of the dense one, alone and inside of larger models of transformers'."""

import pytest
import slimcli
import torch
import transformers

from slim_transformers import as_transformers, living_inputs
from slim_transformers.build import small_bodies, small_models

SMALL = {**small_models(), **small_bodies()}
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 64}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IMAGE = 60


def awake(model):
    """With weights large enough that whatever differs shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.8 * noise / parameter[0].numel() ** 0.5)
    return model.eval()


def tower(dense, keep_rate, dead="discard", method="life", **how):
    torch.manual_seed(0)
    return as_transformers(slimcli.slim(dense, keep_rate, dead=dead, method=method).eval(), **how)


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(found, expected):
    if isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif expected is None:
        assert found is None
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def clip():
    text = {**TEXT, "max_position_embeddings": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION))


def siglip():
    text = {**TEXT, "max_position_embeddings": 8, "projection_size": 32}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


def llava(layer=-2, **vision):
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    if vision:
        vision, strategy = transformers.SiglipVisionConfig(**VISION, **vision), "full"
    else:
        vision, strategy = transformers.CLIPVisionConfig(**VISION), "default"
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=layer
    )
    config.vision_feature_select_strategy = strategy
    return awake(transformers.LlavaForConditionalGeneration(config))


def question(rows=2, count=1):
    """Text, `count` images of 16 patches, and text again, in each row."""
    row = [3, 4, *[IMAGE] * 16 * count, 5, 6, 7]
    return {"input_ids": torch.tensor([row] * rows), "attention_mask": torch.ones(rows, len(row), dtype=torch.long)}


@torch.no_grad()
@pytest.mark.parametrize(
    "asked", [{}, {"output_hidden_states": True}, {"output_hidden_states": [-2, 0]}, {"return_dict": False}], ids=str
)
@pytest.mark.parametrize("name", SMALL)
def test_a_model_that_keeps_all_patches_answers_every_call_as_its_dense_model(name, asked):
    dense = awake(SMALL[name]())
    expected, found = dense(pixel_values=images(), **asked), tower(dense, 1.0)(pixel_values=images(), **asked)
    assert type(found) is type(expected)
    if "return_dict" not in asked:
        assert list(found) == list(expected)
        expected, found = expected.to_tuple(), found.to_tuple()
    same(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_a_model_that_drops_patches_gives_all_of_them_back_in_the_dense_shapes(name):
    dense = awake(SMALL[name]())
    expected, found = dense(images(), output_hidden_states=True), tower(dense, 0.5)(images(), output_hidden_states=True)
    assert [y.shape for y in found.hidden_states] == [y.shape for y in expected.hidden_states]
    same(found.hidden_states[:2], expected.hidden_states[:2])  # no patch has left after the first block
    assert (found.hidden_states[-1] - expected.hidden_states[-1]).abs().max() > 1e-3
    field = next(iter(expected))
    if torch.is_tensor(expected[field]):
        assert found[field].shape == expected[field].shape


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Dinov2Backbone", "Dinov2WithRegistersBackbone", "BeitBackbone"])
def test_feature_maps_are_those_of_the_dense_backbone(kind):
    body = awake(SMALL[kind.replace("Backbone", "Model")]())
    dense = SMALL[kind]()
    (dense.beit if hasattr(dense, "beit") else dense).load_state_dict(body.state_dict(), strict=False)
    dense.out_indices = [1, 3]
    expected = dense(images())
    for found in (tower(dense, 1.0), tower(body, 1.0, out_indices=[1, -1])):
        same(found(images()).feature_maps, expected.feature_maps)
        assert found.channels == dense.channels == [32, 32] and found.out_features == ["stage1", "stage3"]
    (map_,) = tower(SMALL["SiglipVisionModel"](), 0.5, out_indices=2)(images()).feature_maps
    assert map_.shape == (2, 32, 4, 4)


@torch.no_grad()
def test_the_maps_of_beit_are_not_normalised_and_go_through_its_neck():
    """As those of the dense one, where it reads its class token and has a neck."""
    config = {**VISION, "num_hidden_layers": 4, "use_mean_pooling": False, "use_relative_position_bias": True}
    dense = awake(transformers.BeitBackbone(transformers.BeitConfig(**config, add_fpn=True, out_indices=[1, 2, 3, 4])))
    expected, found = dense(images()).feature_maps, tower(dense, 1.0)(images()).feature_maps
    assert [one.shape[-1] for one in found] == [16, 8, 4, 2]
    same(found, expected)
    assert [one.shape for one in tower(dense, 0.5)(images()).feature_maps] == [one.shape for one in expected]


@torch.no_grad()
@pytest.mark.parametrize("how", [{"dead": "heir"}, {"method": "tome"}], ids=str)
@pytest.mark.parametrize(
    "name", ["SiglipVisionModel", "SiglipForImageClassification", "CLIPForImageClassification", "BeitModel"]
)
def test_what_pools_patches_sees_each_as_often_as_it_stands_for_some(name, how):
    """The dense head on all patches, those that left being what they are part of."""
    dense = awake(SMALL[name]())
    if name == "BeitModel" and "method" in how:
        pytest.skip("ToMe cannot merge tokens with relative positions")
    found = tower(dense, 0.5, **how)(images(), output_hidden_states=[-1])
    head = slimcli.slim(dense).backbone.head(found.hidden_states[-1])
    same(found["logits" if "logits" in found else "pooler_output"], head)


@torch.no_grad()
@pytest.mark.parametrize("build", [clip, siglip])
def test_a_slimmed_tower_inside_a_model_of_images_and_texts(build):
    model = awake(build())
    inputs = {"input_ids": torch.tensor([[0, 5, 9, 1], [0, 8, 7, 1]]), "pixel_values": images()}
    expected = model(**inputs)
    vision = model.vision_model
    features = model.get_image_features(images(), output_hidden_states=True)
    model.vision_model = tower(vision, 1.0)
    same(model(**inputs).logits_per_image, expected.logits_per_image)
    found = model.get_image_features(images(), output_hidden_states=True)
    same((*found.hidden_states, found.pooler_output), (*features.hidden_states, features.pooler_output))
    model.vision_model = tower(vision, 0.5)
    slimmed = model(**inputs)
    assert (slimmed.logits_per_image - expected.logits_per_image).abs().max() > 1e-4
    shape = expected.vision_model_output.last_hidden_state.shape
    assert slimmed.vision_model_output.last_hidden_state.shape == shape
    # where only what is pooled is read, the slimmed model itself will do
    model.vision_model = model.vision_model.slimmed
    same(model(**inputs).logits_per_image, slimmed.logits_per_image)


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"vision_use_head": False}, {"layer": [-2, -1]}], ids=str)
def test_a_language_model_gets_all_patches_or_the_living_ones_at_their_positions(how):
    model = llava(**how)
    inputs, seen = question(), []
    model.model.language_model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw), with_kwargs=True)
    expected = model(**inputs, pixel_values=images()).logits
    vision = model.model.vision_tower
    for patches in ("all", "living"):
        model.model.vision_tower = tower(vision, 1.0, patches=patches)
        same(model(**inputs, pixel_values=images()).logits, expected)
    model.model.vision_tower = tower(vision, 0.5)
    assert model(**inputs, pixel_values=images()).logits.shape == expected.shape
    whole = seen[-1]["inputs_embeds"]

    model.model.vision_tower = tower(vision, 0.5, patches="living")
    features = model.get_image_features(images())
    positions = features.patch_positions
    count = model.model.vision_tower.slimmed.patches_per_layer[-1]
    assert positions.shape == (2, count) and count < 16
    assert (positions.diff(dim=1) > 0).all() and positions.max() < 16
    fewer = living_inputs(inputs, positions, IMAGE)
    length = inputs["input_ids"].shape[1] - 16 + count
    assert fewer["input_ids"].shape == fewer["attention_mask"].shape == fewer["position_ids"].shape == (2, length)
    text = torch.tensor([[18, 19, 20]]).expand(2, -1)
    assert torch.equal(fewer["position_ids"], torch.cat((torch.tensor([[0, 1]] * 2), positions + 2, text), dim=1))
    assert model(**fewer, pixel_values=images()).logits.shape == (2, length, 64)
    # the same patches, with the features that they have among all
    same(seen[-1]["inputs_embeds"], whole.gather(1, fewer["position_ids"].unsqueeze(-1).expand(-1, -1, 16)))
    written = model.generate(**fewer, pixel_values=images(), max_new_tokens=3, do_sample=False)
    assert written.shape[1] > length


def test_several_images_in_a_row_keep_each_its_own_patches():
    positions = torch.tensor([[0, 15], [3, 4], [1, 2], [7, 8]])
    fewer = living_inputs(question(count=2), positions, IMAGE)
    expected = [[0, 1, 2, 17, 21, 22, 34, 35, 36], [0, 1, 3, 4, 25, 26, 34, 35, 36]]
    assert fewer["position_ids"].tolist() == expected
    assert fewer["input_ids"][0].tolist() == [3, 4, *[IMAGE] * 4, 5, 6, 7]


@torch.no_grad()
def test_a_depth_model_of_transformers_takes_a_slimmed_backbone():
    config = transformers.Dinov2Config(**{**VISION, "num_hidden_layers": 4}, mlp_ratio=2, out_indices=[1, 2, 3, 4])
    config.reshape_hidden_states = False
    config = transformers.DPTConfig(
        backbone_config=config,
        image_size=32,
        patch_size=8,
        hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    model = awake(transformers.DPTForDepthEstimation(config))
    expected, backbone = model(images()).predicted_depth, model.backbone
    model.backbone = tower(backbone, 1.0)
    same(model(images()).predicted_depth, expected)
    model.backbone = tower(backbone, 0.5)
    assert model(images()).predicted_depth.shape == expected.shape


@torch.no_grad()
def test_what_the_dense_model_says_of_itself_is_there():
    dense = SMALL["CLIPVisionModel"]()
    found = tower(dense, 0.5)
    assert found.config is dense.config and found.dtype == torch.float32 and found.device.type == "cpu"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = found.no_such_thing


def test_what_cannot_be_is_said_in_one_line():
    dense = SMALL["CLIPVisionModel"]()
    with pytest.raises(slimcli.SlimError, match=r"out_indices = 4: the model has blocks 1 to 3"):
        tower(dense, 0.5, out_indices=[1, 4])
    with pytest.raises(slimcli.SlimError, match="expected all or living"):
        tower(dense, 0.5, patches="dead")
    with pytest.raises(slimcli.SlimError, match=r"takes a slimmed model of transformers'.* not a CLIPVisionModel"):
        as_transformers(dense)
    with pytest.raises(slimcli.SlimError, match="interpolate_pos_encoding: not possible with a slimmed CLIPVisionMod"):
        tower(dense, 0.5)(images(), interpolate_pos_encoding=True)
    with pytest.raises(slimcli.SlimError, match="evo-vit does not say where its patches go"):
        tower(SMALL["ViTModel"](), 0.5, method="evo-vit")(images())
    with pytest.raises(slimcli.SlimError, match="how many live differs"):
        fused = slimcli.slim(SMALL["ViTModel"](), [(1, 0.5), (2, 0.5)], method="evit").eval()
        as_transformers(fused, patches="living")(images())
    with pytest.raises(slimcli.SlimError, match="16 image tokens an image, and patch 16 lives"):
        living_inputs(question(), torch.tensor([[1, 16], [1, 2]]), IMAGE)
    with pytest.raises(slimcli.SlimError, match=r"\[16, 16\] image tokens a row for 3 images"):
        living_inputs(question(), torch.tensor([[1, 2]] * 3), IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("patches", ["all", "living"])
def test_a_tower_compiles_in_one_graph(patches):
    found = tower(SMALL["CLIPVisionModel"](), 0.5, dead="heir", patches=patches)
    compiled = torch.compile(found, fullgraph=True, backend="eager", dynamic=False)
    asked = {"output_hidden_states": [-2]}
    same(compiled(images(), **asked).hidden_states, found(images(), **asked).hidden_states)
