"""ImageNet networks: against torchvision's implementation, timm's, and the paper's table 7."""
import pytest
import timm
import torch
import torchvision

import wrn_timm  # noqa: F401

MILLIONS = {'wrn18_1': 11.7, 'wrn18_1_5': 25.9, 'wrn18_2': 45.6, 'wrn18_3': 101.8, 'wrn34_1': 21.8,
            'wrn34_1_5': 48.6, 'wrn34_2': 86.0}  # table 7


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameters_of_torchvision_and_table_7():
    assert count(timm.create_model('wrn50_2', device='meta')) == 68_883_240
    assert count(timm.create_model('wrn101_2', device='meta')) == 126_886_696
    for name, millions in MILLIONS.items():
        assert round(count(timm.create_model(name, device='meta')) / 1e6, 1) == millions


def test_bottleneck_depths_and_widths():
    for name, depth, width in (('wrn50_4', 50, 4), ('wrn152_2', 152, 2), ('wrn200_2', 200, 2)):
        model = timm.create_model(name, device='meta')
        convolutions = [m for n, m in model.named_modules()
                        if isinstance(m, torch.nn.Conv2d) and 'downsample' not in n]
        assert len(convolutions) + 1 == depth
        assert model.layer1[0].conv2.out_channels == 64 * width and model.num_features == 2048


def test_forward_equals_torchvision():
    reference = torchvision.models.wide_resnet50_2(weights=None).eval()
    for m in reference.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.running_var, .5, 1.5)
            torch.nn.init.normal_(m.running_mean, std=.1)
    model = timm.create_model('wrn50_2').eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


def test_configurations_are_those_of_timm():
    for ours, theirs in (
            ('wrn18_1', 'resnet18'), ('wrn34_1', 'resnet34'), ('wrn50_2', 'wide_resnet50_2'),
            ('wrn101_2', 'wide_resnet101_2')):
        a, b = timm.models.get_arch_pretrained_cfgs(ours), timm.models.get_arch_pretrained_cfgs(theirs)
        assert {n.split('.')[1] for n in a} == {n.split('.')[1] for n in b}
        assert timm.get_pretrained_cfg(ours).tag == timm.get_pretrained_cfg(theirs).tag
        for name, cfg in a.items():
            other = b[name.replace(ours, theirs)]
            assert cfg.hf_hub_id == f'timm/{theirs}.{cfg.tag}'
            for field in ('mean', 'std', 'input_size', 'crop_pct', 'interpolation', 'test_input_size', 'license'):
                assert getattr(cfg, field) == getattr(other, field)


def test_features_of_five_levels():
    model = timm.create_model('wrn18_1_5', features_only=True).eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert model.feature_info.channels() == [64, 96, 192, 384, 768]
    assert [f.shape[1] for f in model(torch.randn(1, 3, 64, 64))] == [64, 96, 192, 384, 768]


def test_stem_for_small_images_is_resnet18s_usual_one():
    """Against torchvision's ResNet-18 with the two changes that everyone makes for CIFAR."""
    reference = torchvision.models.resnet18(num_classes=10).eval()
    reference.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = torch.nn.Identity()
    model = timm.create_model('wrn18_1', stem='cifar', num_classes=10).eval()
    assert count(model) == 11_173_962
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == set(timm.create_model('resnet18').state_dict())
    backbone = timm.create_model('wrn18_1', stem='cifar', features_only=True)
    assert [32 // f.shape[-1] for f in backbone(x)] == backbone.feature_info.reduction() == [1, 1, 2, 4, 8]
    for output_stride in (2, 4, 8):
        dilated = timm.create_model('wrn18_1', stem='cifar', output_stride=output_stride).eval()
        assert dilated.feature_info[-1]['reduction'] == output_stride == 32 // dilated.forward_features(x).shape[-1]
    with pytest.raises(ValueError, match="output_stride is 16; with the 'cifar' stem it can be 2, 4 or 8"):
        timm.create_model('wrn18_1', stem='cifar', output_stride=16)
    with pytest.raises(ValueError, match="stem 'vit' is unknown; choose 'cifar' or 'imagenet'"):
        timm.create_model('wrn18_1', stem='vit')
