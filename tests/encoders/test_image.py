import logging

import pytest
import torch
from torch import nn

from counterpoint import encoders
from counterpoint.errors import InputError
from counterpoint.views import plain


@pytest.mark.parametrize("name", ["convnet", "convnet-8", "resnet18"])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_and_gradients(name, channels):
    net = encoders.image(name, image_size=32, channels=channels)
    assert (net.name, net.image_size, net.channels) == (name, 32, channels)
    features = net(torch.rand(2, channels, 32, 32))
    assert features.pooled.shape == (2, net.dim) and features.tokens is None
    assert features.map.shape == (2, net.dim, 4, 4)
    torch.testing.assert_close(features.map.mean((2, 3)), features.pooled)
    features.pooled.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    # the first layer hears of it
    assert bool(next(net.parameters()).grad.any())


def test_convnet_width_is_its_dimension():
    assert encoders.image("convnet").dim == 128
    assert encoders.image("convnet-32").dim == 256


@pytest.mark.parametrize("side", [4, 8, 28, 33, 96])
def test_convnet_takes_any_size(side):
    net = encoders.image("convnet-4", image_size=side, channels=1).eval()
    assert net(torch.rand(1, 1, side, side)).pooled.shape == (1, 32)


def test_convnet_starts_with_activations_of_order_one():
    torch.manual_seed(0)
    net = encoders.image("convnet", image_size=32)
    pooled = net(torch.rand(32, 3, 32, 32)).pooled
    assert 0.2 < float(pooled.detach().mean()) < 3


@pytest.mark.parametrize("side", [64, 65])
def test_small_images_get_a_stem_that_keeps_their_resolution(side, caplog):
    with caplog.at_level(logging.INFO, logger="counterpoint"):
        net = encoders.image("resnet18", image_size=side)
        net.eval()(torch.rand(1, 3, side, side))
    small = side <= 64
    assert net.small_stem is small
    assert net.model.conv1.kernel_size == ((3, 3) if small else (7, 7))
    assert net.model.conv1.stride == ((1, 1) if small else (2, 2))
    assert isinstance(net.model.maxpool, nn.Identity) is small
    said = [record for record in caplog.records if "resolution" in record.message]
    assert len(said) == (1 if small else 0)
    assert net(torch.rand(1, 3, side, side)).map.shape[-1] == (8 if small else 3)


def test_deep_stems_keep_their_layers():
    net = encoders.image("resnet26d", image_size=32, channels=1).eval()
    assert net.small_stem and net(torch.rand(1, 1, 32, 32)).map.shape == (1, net.dim, 4, 4)


def test_transformer_gives_tokens_at_the_asked_size():
    net = encoders.image("vit_tiny_patch16_224", image_size=32, channels=1).eval()
    features = net(torch.rand(2, 1, 32, 32))
    assert features.pooled.shape == (2, net.dim) == (2, 192)
    assert features.tokens.shape == (2, 1 + 4, 192) and features.map is None


def test_map_has_channels_first_where_the_model_has_them_last():
    net = encoders.image("swin_tiny_patch4_window7_224").eval()
    assert net(torch.rand(1, 3, 224, 224)).map.shape == (1, net.dim, 7, 7)


def test_embed_brings_images_to_the_encoders_size():
    net = encoders.image("convnet-4", image_size=16, channels=1).eval()
    image = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(net.embed({"image": image}), net(plain(image, 16)).pooled)


def test_pooled_dimension_is_right_where_the_head_widens():
    net = encoders.image("mobilenetv3_small_050", image_size=32).eval()
    assert net(torch.rand(2, 3, 32, 32)).pooled.shape == (2, net.dim)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match=r"resnt18.*did you mean resnet18"):
        encoders.image("resnt18")
    with pytest.raises(InputError, match="did you mean convnet"):
        encoders.image("convnt")


def test_bad_arguments():
    with pytest.raises(InputError, match="pretrained"):
        encoders.image("convnet", pretrained=True)
    with pytest.raises(InputError, match="width"):
        encoders.image("convnet-0")
    with pytest.raises(InputError, match="channels"):
        encoders.image("resnet18", channels=0)


def test_timm_models_normalise_images_as_timm_says():
    encoder = encoders.image("resnet10t", image_size=96).eval()
    cfg = encoder.model.pretrained_cfg
    images = torch.rand(2, 3, 96, 96)
    normalised = (images - torch.tensor(cfg["mean"])[:, None, None]) / torch.tensor(cfg["std"])[:, None, None]
    expected = encoder.model.forward_head(encoder.model.forward_features(normalised), pre_logits=True)
    torch.testing.assert_close(encoder(images).pooled, expected)
