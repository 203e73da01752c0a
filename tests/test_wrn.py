"""The 6N + 4 family: against the paper's counts, an independent implementation, and what timm's users do."""
import copy
import functools
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

import wrn_timm
from wrn_timm.wrn import VARIANTS

# (depth, width): trainable parameters with 10 classes, as the paper (table 4) and the authors' code give them
PARAMETERS = {
    (16, 4): 2_748_890, (40, 2): 2_243_546, (40, 4): 8_949_210, (16, 10): 17_116_634, (22, 8): 17_158_106,
    (40, 8): 35_748_314, (28, 10): 36_479_194,
}


def create(name='wrn16_1', **kwargs):
    return timm.create_model(name, **kwargs).eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('depth_width', PARAMETERS)
def test_parameter_counts_of_the_paper(depth_width):
    name = 'wrn{}_{}'.format(*depth_width)
    assert count(timm.create_model(name, device='meta')) == PARAMETERS[depth_width]


def test_parameter_count_with_100_classes():
    assert count(timm.create_model('wrn28_10.cifar100', device='meta')) == 36_536_884


def reference_parameters(depth, width, classes):
    """Counted from the paper's table 1 alone."""
    n, channels = (depth - 4) // 6, [16 * width, 32 * width, 64 * width]
    total, c = 3 * 16 * 9, 16
    for out in channels:
        for i in range(n):
            total += 2 * c + c * out * 9 + 2 * out + out * out * 9 + (c * out if i == 0 and c != out else 0)
            c = out
    return total + 2 * c + c * classes + classes


@pytest.mark.parametrize('depth,width', VARIANTS)
def test_every_variant_has_the_parameters_of_table_1(depth, width):
    assert count(timm.create_model(f'wrn{depth}_{width}', device='meta')) == reference_parameters(depth, width, 10)


def functional_wrn(x, params, depth, width):
    """Pre-activation WRN written from the paper on a flat dictionary of bare tensors, as the authors lay it out."""
    n = (depth - 4) // 6

    def norm_relu(x, base):
        p = [params[f'{base}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')]
        return F.relu(F.batch_norm(x, *p, training=False))

    x = F.conv2d(x, params['conv0'], padding=1)
    for g in range(3):
        for b in range(n):
            base, stride = f'group{g}.block{b}', 2 if g and not b else 1
            o = norm_relu(x, f'{base}.bn0')
            y = F.conv2d(o, params[f'{base}.conv0'], stride=stride, padding=1)
            z = F.conv2d(norm_relu(y, f'{base}.bn1'), params[f'{base}.conv1'], padding=1)
            x = z + (F.conv2d(o, params[f'{base}.convdim'], stride=stride) if f'{base}.convdim' in params else x)
    return F.linear(norm_relu(x, 'bn').mean((2, 3)), params['fc.weight'], params['fc.bias'])


def functional_params(depth, width, classes=10):
    """Random weights in the authors' layout, BatchNorm statistics included."""
    params = {'conv0': torch.randn(16, 3, 3, 3) / 5}

    def norm(base, c):
        params.update({f'{base}.weight': torch.rand(c) + .5, f'{base}.bias': torch.randn(c) / 5,
                       f'{base}.running_mean': torch.randn(c) / 5, f'{base}.running_var': torch.rand(c) + .5})

    c = 16
    for g, out in enumerate((16 * width, 32 * width, 64 * width)):
        for b in range((depth - 4) // 6):
            base = f'group{g}.block{b}'
            norm(f'{base}.bn0', c)
            norm(f'{base}.bn1', out)
            params[f'{base}.conv0'] = torch.randn(out, c, 3, 3) / (3 * c ** .5)
            params[f'{base}.conv1'] = torch.randn(out, out, 3, 3) / (3 * out ** .5)
            if c != out:
                params[f'{base}.convdim'] = torch.randn(out, c, 1, 1) / c ** .5
            c = out
    norm('bn', c)
    params.update({'fc.weight': torch.randn(classes, c) / c ** .5, 'fc.bias': torch.randn(classes)})
    return params


@pytest.mark.parametrize('depth,width', [(16, 1), (16, 2), (22, 2), (40, 1)])
def test_forward_equals_an_independent_implementation(depth, width):
    params = functional_params(depth, width)
    model = create(f'wrn{depth}_{width}')
    model.load_state_dict(wrn_timm.checkpoints.convert_state_dict(params))
    x = torch.randn(2, 3, 32, 32)
    expected = functional_wrn(x, params, depth, width)
    assert expected.std() > .1
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_gradients_agree_with_finite_differences():
    model = create().double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    weight = model.layer2[0].shortcut.weight
    model(x)[0, 3].backward()
    step = torch.zeros_like(weight)
    step[5, 7] = 1e-6
    with torch.no_grad():
        weight += step
        up = model(x)[0, 3]
        weight -= 2 * step
        down = model(x)[0, 3]
    assert weight.grad[5, 7].item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-4)


@pytest.mark.parametrize('size', [(32, 32), (64, 64), (17, 23), (224, 224)])
def test_any_input_size(size):
    assert create()(torch.randn(2, 3, *size)).shape == (2, 10)


@pytest.mark.parametrize('stem,reductions', [('cifar', [1, 2, 4]), ('imagenet', [4, 8, 16])])
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
def test_features_only(stem, reductions, feature_cls):
    model = create('wrn16_2', features_only=True, feature_cls=feature_cls, stem=stem)
    assert model.feature_info.reduction() == reductions
    assert model.feature_info.channels() == [32, 64, 128]
    features = model(torch.randn(1, 3, 64, 64))
    features = list(features.values()) if isinstance(features, dict) else features
    assert [tuple(f.shape[1:]) for f in features] == [
        (c, 64 // r, 64 // r) for c, r in zip((32, 64, 128), reductions, strict=True)]


def test_every_way_to_features_gives_the_same_raw_stage_outputs():
    torch.manual_seed(0)
    whole = create('wrn16_1')
    x = torch.randn(1, 3, 32, 32)
    expected = [whole.maxpool(whole.conv1(x))]
    for name in ('layer1', 'layer2', 'layer3'):
        expected.append(getattr(whole, name)(expected[-1]))
    del expected[0]
    for feature_cls in ('list', 'dict', 'hook', 'fx', 'getter'):
        torch.manual_seed(0)  # the same fresh weights
        features = create('wrn16_1', features_only=True, feature_cls=feature_cls)(x)
        for f, e in zip(list(features.values()) if isinstance(features, dict) else features, expected, strict=True):
            torch.testing.assert_close(f, e)


def test_intermediates_norm_and_stop_early():
    model = create()
    x = torch.randn(1, 3, 32, 32)
    final, raw = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    _, normed = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(normed[-1], final)
    assert not torch.allclose(raw[-1], final)
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [raw[0]])
    with pytest.raises(ValueError, match="output_fmt 'NLC' is not supported; use 'NCHW'"):
        model.forward_intermediates(x, output_fmt='NLC')


def test_prune_keeps_what_is_asked_for():
    model, x = create(), torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    before = count(model)
    assert model.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True), expected)
    assert count(model) < before and model.num_features == 32


@pytest.mark.parametrize('pool,multiple', [('avg', 1), ('max', 1), ('avgmax', 1), ('catavgmax', 2)])
def test_global_pool_and_classifier(pool, multiple):
    model, x = create(global_pool=pool, num_classes=7), torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7) and model.head_hidden_size == 64 * multiple
    pre = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pre.shape == (2, 64 * multiple)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre)
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3) and model.get_classifier() is model.fc
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 64, 8, 8)


@pytest.mark.parametrize('in_chans', [1, 4, 6])
def test_in_chans(in_chans):
    assert create(in_chans=in_chans)(torch.randn(1, in_chans, 32, 32)).shape == (1, 10)


def test_dropout_stands_between_the_convolutions_and_only_trains():
    model, x = create(conv_drop_rate=0.5), torch.randn(4, 3, 32, 32)
    assert [type(m).__name__ for m in model.layer1[0].children()][4:7] == ['ReLU', 'Dropout', 'Conv2d']
    torch.testing.assert_close(model(x), model(x))
    model.train()
    assert not torch.allclose(model(x), model(x))


def test_drop_path_rises_linearly_from_zero():
    model = create('wrn16_1', drop_path_rate=0.5)
    rates = [getattr(b.drop_path, 'drop_prob', 0.) for s in ('layer1', 'layer2', 'layer3') for b in getattr(model, s)]
    assert rates == pytest.approx([0, .1, .2, .3, .4, .5])


def test_grad_checkpointing_gives_the_same_gradients():
    plain, x = timm.create_model('wrn16_1'), torch.randn(4, 3, 32, 32)
    checked = copy.deepcopy(plain)
    checked.set_grad_checkpointing()
    for model in (plain, checked):
        model.train()(x).square().mean().backward()
    for a, b in zip(plain.parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_layer_decay_orders_stem_blocks_and_head():
    model = timm.create_model('wrn16_1')
    optimizer = create_optimizer_v2(model, 'sgd', lr=1., weight_decay=0., layer_decay=.5)
    scale = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    order = [model.conv1.weight, model.layer1[0].conv1.weight, model.layer1[1].conv1.weight,
             model.layer2[0].conv1.weight, model.layer3[1].conv2.weight, model.fc.weight]
    scales = [scale[id(p)] for p in order]
    assert scales == sorted(scales) and scales[0] < scales[1] < scales[2] < scales[3] and scales[-1] == 1.
    coarse = model.group_matcher(coarse=True)
    assert 'stem' in coarse and 'blocks' in coarse


def test_device_dtype_and_meta():
    assert next(create(device='meta').parameters()).is_meta
    model = create(dtype=torch.bfloat16)
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_pickle_and_deepcopy():
    model, x = create(), torch.randn(1, 3, 32, 32)
    other = create()
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))


def test_torchscript_export_and_compile():
    model, x = create(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize('depth,nearest', [(30, '28, 34'), (5, '10'), (18, '16, 22'), (0, '10')])
def test_depth_error_names_the_nearest(depth, nearest):
    with pytest.raises(ValueError, match=f'^depth {depth} is not 6N\\+4; nearest: {nearest}$'):
        wrn_timm.WideResNet(depth=depth, width=1)


@pytest.mark.parametrize('width,nearest', [(1.1, r'1\.0625, 1\.125'), (0, r'0\.0625'), (-2, r'0\.0625')])
def test_width_error_names_the_nearest(width, nearest):
    with pytest.raises(ValueError, match=f'nearest: {nearest}$'):
        wrn_timm.register_wrn(16, width)


def test_unknown_stem_and_argument():
    with pytest.raises(ValueError, match="stem 'cifra' is unknown; choose 'cifar' or 'imagenet'"):
        timm.create_model('wrn16_1', stem='cifra')
    with pytest.raises(TypeError, match='dropout'):
        timm.create_model('wrn16_1', dropout=0.3)


def test_register_any_depth_and_fractional_width():
    name = wrn_timm.register_wrn(10, 0.5)
    assert name == 'wrn10_0_5' and wrn_timm.register_wrn(10, 0.5) == name
    model = create(name + '.cifar100')
    assert model.feature_info[0]['num_chs'] == 8 and model(torch.randn(1, 3, 32, 32)).shape == (1, 100)


def test_a_name_that_an_imagenet_network_has_is_not_taken():
    with pytest.raises(ValueError, match=r'wrn34_2 is the name of another network.*WideResNet\(depth=34, width=2\)'):
        wrn_timm.register_wrn(34, 2)
    assert wrn_timm.WideResNet(34, 2).num_features == 128


@pytest.mark.parametrize('act_layer', ['gelu', 'silu', torch.nn.GELU])
def test_activations_by_name_or_class(act_layer):
    assert create(act_layer=act_layer)(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_without_normalisation_the_shortcut_takes_the_raw_tensor():
    model = create(norm_layer=torch.nn.Identity)
    x = torch.randn(2, 3, 32, 32)
    expected = F.conv2d(x, model.conv1.weight, padding=1)
    for block in (*model.layer1, *model.layer2, *model.layer3):
        out, stride = F.relu(expected), block.conv1.stride
        shortcut = expected if block.shortcut is None else F.conv2d(out, block.shortcut.weight, stride=stride)
        out = F.relu(F.conv2d(out, block.conv1.weight, stride=stride, padding=1))
        expected = F.conv2d(out, block.conv2.weight, padding=1) + shortcut
    torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True)[-1], expected)


@pytest.mark.parametrize('stem,finest', [('cifar', 1), ('imagenet', 4)])
def test_dilation_gives_the_same_values_at_the_old_places_and_more_between(stem, finest):
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    strided = create('wrn16_2', stem=stem).forward_intermediates(x, intermediates_only=True)
    for output_stride in (finest, 2 * finest, 4 * finest):
        torch.manual_seed(0)
        model = create('wrn16_2', stem=stem, output_stride=output_stride)
        assert model.feature_info[-1]['reduction'] == output_stride
        dense = model.forward_intermediates(x, intermediates_only=True)
        for info, a, b in zip(model.feature_info, strided, dense, strict=True):
            step = b.shape[-1] // a.shape[-1]
            assert b.shape[-1] == 64 // info['reduction']
            torch.testing.assert_close(b[:, :, ::step, ::step], a)
    with pytest.raises(ValueError, match=f'output_stride is 3; with the {stem!r} stem it can be {finest}, '):
        create('wrn16_2', stem=stem, output_stride=3)


def test_group_norm_does_not_mix_images_and_has_no_statistics():
    model = timm.create_model('wrn16_4', norm_layer=functools.partial(timm.layers.GroupNorm, num_groups=16)).train()
    assert count(model) == PARAMETERS[16, 4] and not list(model.buffers())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_width_and_depth_of_a_known_name_can_be_given():
    assert count(create(depth=22, width=2)) == count(create('wrn22_2'))


def test_configuration_fields():
    assert 'label_names' not in timm.create_model('wrn28_1').pretrained_cfg  # ten classes, but which?
    cfg = timm.create_model('wrn28_1.cifar10').pretrained_cfg
    assert (cfg['input_size'], cfg['pool_size'], cfg['crop_pct'], cfg['tag']) == ((3, 32, 32), (8, 8), 1.0, 'cifar10')
    assert cfg['label_names'][3] == 'cat' and cfg['paper_ids'] == 'arXiv:1605.07146'
    cfg = timm.get_pretrained_cfg('wrn28_1.cifar100')
    assert cfg.num_classes == 100 and len(set(cfg.label_names)) == 100 and cfg.label_names[-1] == 'worm'
