"""The drop-in modules inside the models they are for."""

import copy
import io

import pytest
import torch

from mmkernels.nn import PatchConv2d, PatchConv3d, PatchEmbed


def assert_same(ours, plain, *inputs):
    """Outputs and the gradients of every parameter agree to float32 rounding."""
    a, b = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(a, b)
    grad = torch.randn_like(b)
    torch.testing.assert_close(
        torch.autograd.grad(a, list(ours.parameters()), grad, allow_unused=True),
        torch.autograd.grad(b, list(plain.parameters()), grad, allow_unused=True),
        rtol=1e-4,
        atol=1e-4,
    )


def swap(model: torch.nn.Module, name: str, layer: type) -> torch.nn.Module:
    swapped = copy.deepcopy(model)
    owner, _, leaf = name.rpartition(".")
    parent = swapped.get_submodule(owner)
    setattr(parent, leaf, layer.from_conv(getattr(parent, leaf)))
    assert swapped.state_dict().keys() == model.state_dict().keys()
    swapped.load_state_dict(model.state_dict())
    return swapped


@pytest.mark.parametrize("bias", [True, False])
def test_in_place_of_a_convolution(bias):
    for plain, layer, shape in (
        (torch.nn.Conv2d(3, 20, 16, stride=16, bias=bias), PatchConv2d, (2, 3, 40, 50)),
        (torch.nn.Conv2d(3, 20, (4, 6), stride=(4, 6), padding="valid", bias=bias), PatchConv2d, (3, 9, 13)),
        (torch.nn.Conv3d(3, 20, (2, 14, 14), stride=(2, 14, 14), bias=bias), PatchConv3d, (2, 3, 5, 28, 30)),
    ):
        ours = layer.from_conv(plain)
        assert ours.weight is plain.weight and ours.bias is plain.bias
        assert_same(ours, plain, torch.randn(shape))


def test_maps_lie_in_memory_as_the_convolutions_do():
    last = torch.randn(2, 3, 40, 50).to(memory_format=torch.channels_last)
    for images in (torch.randn(2, 3, 40, 50), torch.randn(3, 40, 50), torch.randn(0, 3, 40, 50), last):
        conv = torch.nn.Conv2d(3, 20, 16, stride=16)
        theirs, ours = conv(images), PatchConv2d.from_conv(conv)(images)
        assert ours.shape == theirs.shape and ours.stride() == theirs.stride()


def test_maps_in_channels_last_need_no_copy():
    """Nor do the flatten and transpose that models put behind them."""
    maps = PatchConv2d(3, 20, 16, stride=16).maps(torch.randn(2, 3, 40, 50))
    tokens = maps.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous() and tokens.data_ptr() == maps.data_ptr()


def convs():
    return [
        (PatchConv2d(3, 6, 4, stride=4), torch.randn(2, 3, 8, 9)),
        (PatchConv3d(3, 6, (2, 4, 4), stride=(2, 4, 4), bias=False), torch.randn(2, 3, 5, 8, 9)),
    ]


def test_seen_by_tracers():
    """As the convolutions they stand for: in a graph of theirs is what any reader of graphs knows."""
    for module, images in convs():
        truth = type(module).__mro__[2].forward(module, images)
        net = torch.nn.Sequential(module, torch.nn.Flatten())
        drawn = torch.fx.symbolic_trace(net)
        assert "mmkernels" not in drawn.code
        for seen in (drawn, torch.jit.trace(net, images), torch.jit.script(net)):
            torch.testing.assert_close(seen(images), truth.flatten(1))
        exported = torch.export.export(net, (images,))
        torch.testing.assert_close(exported.module()(images), truth.flatten(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"stride is \(1, 1\); .* it must be \(4, 4\)"),
        ({"stride": 4, "dilation": 2}, "dilation is"),
        ({"stride": 4, "groups": 3}, "groups is 3"),
        ({"stride": 4, "padding": 1}, "padding is"),
    ],
)
def test_other_convolutions_are_refused(options, message):
    with pytest.raises(ValueError, match=f"PatchConv2d: {message}"):
        PatchConv2d(3, 6, 4, **options)


def test_in_transformers_clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = CLIPVisionModel(config).eval()
    name = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        swap(model, name, PatchConv2d)(pixels).last_hidden_state, model(pixels).last_hidden_state
    )


def test_in_transformers_qwen2_vl():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed as Qwen2VLPatchEmbed

    model = Qwen2VLPatchEmbed(patch_size=14, temporal_patch_size=2, in_channels=3, embed_dim=40)
    assert_same(swap(model, "proj", PatchConv3d), model, torch.randn(12, 3 * 2 * 14 * 14))


def test_in_timm():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0).eval()
    pixels = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(swap(model, "patch_embed.proj", PatchConv2d)(pixels), model(pixels))


def test_in_open_clip():
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(layers=1, width=32, heads=2, vocab_size=50, context_length=8)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        swap(model, "visual.conv1", PatchConv2d).encode_image(pixels), model.encode_image(pixels)
    )


def test_patch_embed_is_the_embedding_of_a_vision_transformer():
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    plain = CLIPVisionEmbeddings(CLIPVisionConfig(hidden_size=32, num_attention_heads=2, image_size=32, patch_size=8))
    ours = PatchEmbed(3, 32, 8, bias=False, num_patches=16, num_prefix=1)
    with torch.no_grad():
        ours.weight.copy_(plain.patch_embedding.weight)
        ours.pos_embed.copy_(plain.position_embedding.weight)
        ours.prefix[0].copy_(plain.class_embedding)
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(pixels), plain(pixels))


def test_patch_embed_normalises_bytes():
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    module = PatchEmbed(3, 12, (2, 8, 8), mean=mean, std=std)
    pixels = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(value).view(3, 1, 1, 1) for value in (mean, std))
    torch.testing.assert_close(module(pixels), module((pixels / 255 - mean) / std))


def test_patch_embed_state_is_its_parameters():
    module = PatchEmbed(3, 12, 4, num_patches=9, num_prefix=2, mean=[0.5] * 3, std=[0.5] * 3)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "weight": (12, 3, 4, 4),
        "bias": (12,),
        "pos_embed": (11, 12),
        "prefix": (2, 12),
    }
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    images = torch.randn(1, 3, 12, 12)
    assert torch.equal(loaded(images), module(images))
    assert repr(module) == "PatchEmbed(3, 12, patch_size=(4, 4), bias=True, positions=11, num_prefix=2)"


def test_a_half_precision_module_still_normalises_in_float32():
    module = PatchEmbed(3, 12, 4, mean=[0.5] * 3, std=[0.25] * 3).bfloat16()
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    assert module(pixels).dtype == torch.bfloat16
    exact = PatchEmbed(3, 12, 4, mean=[0.4823] * 3, std=[0.2613] * 3).half().float()  # as if loaded, then trained
    normal = (pixels.double() / 255 - 0.4823) / 0.2613
    truth = torch.nn.functional.conv2d(normal, exact.weight.double(), exact.bias.double(), stride=4)
    torch.testing.assert_close(exact(pixels), truth.float().flatten(2).transpose(1, 2), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["to_empty", "reset_parameters", "assign"])
def test_patch_embed_made_on_meta(way):
    """What is no parameter is as it was made, wherever the memory comes from."""
    options = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    plain = PatchEmbed(3, 8, 4, **options)
    with torch.device("meta"):
        module = PatchEmbed(3, 8, 4, **options)
    if way != "assign":
        module.to_empty(device="cpu")
    if way == "reset_parameters":
        module.reset_parameters()
    module.load_state_dict(plain.state_dict(), assign=way == "assign")
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(module(pixels), plain(pixels)) and not list(module.buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (1, 2, 3, 4)}, "patch_size is"),
        ({"patch_size": 4, "mean": [0.5] * 3}, "mean and std must both be given, 3 numbers each"),
        ({"patch_size": 4, "mean": [0.5], "std": [0.5]}, "mean and std must both be given"),
    ],
)
def test_patch_embed_errors(options, message):
    with pytest.raises(ValueError, match=f"PatchEmbed: {message}"):
        PatchEmbed(3, 12, **options)
