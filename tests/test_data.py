"""Images as they are read, split, held on the device and augmented."""
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLE, cifar10_dir
from PIL import Image
from torchvision import datasets as tv
from torchvision.transforms import v2

from wrn_timm.data import datasets
from wrn_timm.data.corrupt import corrupt
from wrn_timm.data.device import DeviceLoader
from wrn_timm.data.folders import read_rgb, scan_folder, split_files


def arrays(n=64, size=32):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    return datasets.ImageArrays(images, torch.arange(n) % 10, tuple('abcdefghij'), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def test_batches_without_augmentation_are_the_normalised_images():
    data = arrays()
    loader = DeviceLoader(data, 16, 'cpu', pad=0, flip=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    seen = []
    for images, labels in loader.epoch(0):
        for image, label in zip(images, labels, strict=True):
            raw = ((image * std + mean) * 255).round().byte()
            index = (data.images == raw).flatten(1).all(1).nonzero().item()
            assert data.labels[index] == label
            seen.append(index)
    assert sorted(seen) == list(range(64))


def test_crop_and_flip_are_windows_of_the_reflected_image():
    data = arrays(8)
    loader = DeviceLoader(data, 8, 'cpu')
    images, _ = next(loader.epoch(0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    padded = F.pad(data.images.float(), [4] * 4, mode='reflect').byte()
    kinds = set()
    for image in ((images * std + mean) * 255).round().byte():
        windows = {(flip, y, x, i): p[:, y:y + 32, x:x + 32].flip(2) if flip else p[:, y:y + 32, x:x + 32]
                   for i, p in enumerate(padded) for flip in (0, 1) for y in range(9) for x in range(9)}
        hits = [kind for kind, window in windows.items() if torch.equal(window, image)]
        assert len(hits) == 1
        kinds.add(hits[0][:3])
    assert len(kinds) > 4 and {k[0] for k in kinds} == {0, 1}


def test_crops_and_flips_are_uniform():
    data = arrays(2000, size=4)
    loader = DeviceLoader(data, 2000, 'cpu', pad=2)
    images, _ = next(loader.epoch(0))
    plain = DeviceLoader(data, 2000, 'cpu', pad=0, flip=False)
    same, _ = next(plain.epoch(0))
    unmoved = (images == same).flatten(1).all(1).float().mean().item()
    assert unmoved == pytest.approx(1 / 50, abs=0.01)  # 5 x 5 windows, half of them mirrored


def test_cutout_clears_a_square_to_the_mean():
    data = arrays(256)
    plain, _ = next(DeviceLoader(data, 256, 'cpu').epoch(0))
    cut, _ = next(DeviceLoader(data, 256, 'cpu', cutout=8).epoch(0))
    changed = (plain != cut).any(1)
    assert (cut.permute(0, 2, 3, 1)[changed] == 0).all()
    areas = changed.flatten(1).sum(1)
    assert areas.max() <= 64 and areas.float().mean() > 40


def test_batches_depend_on_seed_epoch_and_step_alone():
    data = arrays()
    whole = list(DeviceLoader(data, 16, 'cpu', seed=3).epoch(5))
    resumed = list(DeviceLoader(data, 16, 'cpu', seed=3).epoch(5, first_step=2))
    for a, b in zip(whole[2:], resumed, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for other in (DeviceLoader(data, 16, 'cpu', seed=4).epoch(5), DeviceLoader(data, 16, 'cpu', seed=3).epoch(6)):
        assert not torch.equal(next(other)[0], whole[0][0])


def test_batch_larger_than_the_set():
    with pytest.raises(ValueError, match='batch size 65 is larger than the 64 training images'):
        DeviceLoader(arrays(), 65, 'cpu')


def test_cifar10_is_torchvisions():
    root = cifar10_dir()
    data, official = datasets.load('cifar10', root, train=False), tv.CIFAR10(root, train=False)
    assert torch.equal(data.images.permute(0, 2, 3, 1), torch.from_numpy(official.data))
    assert data.labels.tolist() == official.targets and list(data.classes) == official.classes


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'cifar10: the official files are not whole under {tmp_path}'):
        datasets.load('cifar10', tmp_path, train=True)
    with pytest.raises(ValueError, match="data set 'cifar' is unknown; choose one of cifar10"):
        datasets.load('cifar', tmp_path, train=True)
    with pytest.raises(ValueError, match="data 'cifar10' is not NAME:DIR"):
        datasets.parse_spec('cifar10')


@pytest.fixture
def folder(tmp_path):
    """Two classes with three photographs each."""
    for name in ('pizza', 'ketch'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for p in sorted((SAMPLE / name).iterdir())[:3]:
            (tmp_path / 'data' / name / p.name).write_bytes(p.read_bytes())
    return tmp_path / 'data'


def test_scan_of_the_sample():
    scan = scan_folder(SAMPLE)
    assert len(scan.train) == 240 and len(scan.train.classes) == 8 and scan.test is None and not scan.bad
    train, test = split_files(scan.train, 0.3, seed=0)
    assert not set(train.paths) & set(test.paths) and len(train) + len(test) == 240
    assert {test.labels.count(label) for label in range(8)} == {9}
    assert split_files(scan.train, 0.3, seed=0)[1] == test != split_files(scan.train, 0.3, seed=1)[1]


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'LA', 'CMYK', '1', 'I;16'])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    suffix = 'jpg' if mode == 'CMYK' else 'png'
    image = Image.new('I;16', (8, 8), 128 * 257) if mode == 'I;16' else Image.new('RGB', (8, 8), 'white').convert(mode)
    image.save(tmp_path / f'x.{suffix}')
    read = read_rgb(tmp_path / f'x.{suffix}')
    assert read.mode == 'RGB'
    assert np.asarray(read).min() >= 250 if mode != 'I;16' else read.getpixel((0, 0)) == (128, 128, 128)


def test_transparency_is_laid_on_white(tmp_path):
    Image.new('RGBA', (4, 4), (200, 0, 0, 0)).save(tmp_path / 'x.png')
    assert read_rgb(tmp_path / 'x.png').getpixel((0, 0)) == (255, 255, 255)


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    image, exif = Image.new('RGB', (8, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / 'x.jpg', exif=exif)
    assert read_rgb(tmp_path / 'x.jpg').size == (4, 8)


def test_bad_files_are_skipped_and_named_or_refused(folder):
    (folder / 'pizza' / 'notes.txt').write_text('no image')
    (folder / 'pizza' / 'empty.jpg').write_bytes(b'')
    whole = (folder / 'pizza' / 'image_0001.jpg').read_bytes()
    (folder / 'pizza' / 'cut, "off" é.jpg').write_bytes(whole[:len(whole) // 2])
    (folder / 'pizza' / '.DS_Store').write_bytes(b'x')
    scan = scan_folder(folder)
    assert len(scan.train) == 6 and len(scan.bad) == 3
    assert any('notes.txt is not an image' in b for b in scan.bad)
    assert any('cut, "off" é.jpg cannot be read: image file is truncated' in b for b in scan.bad)
    with pytest.raises(ValueError, match='3 files are not whole images: .*empty.jpg is not an image'):
        scan_folder(folder, on_bad='fail')


def test_given_split_is_kept(folder):
    (folder / 'train').mkdir()
    (folder / 'val').mkdir()
    with pytest.raises(ValueError, match='beside them ketch, pizza'):
        scan_folder(folder)
    for name in ('pizza', 'ketch'):
        shutil.rmtree(folder / name)
    for part in ('train', 'val'):
        for name in ('pizza', 'ketch'):
            (folder / part / name).mkdir()
            for p in sorted((SAMPLE / name).iterdir())[:2 if part == 'train' else 1]:
                (folder / part / name / p.name).write_bytes(p.read_bytes())
    scan = scan_folder(folder)
    assert (len(scan.train), len(scan.test)) == (4, 2)
    (folder / 'val' / 'watch').mkdir()
    with pytest.raises(ValueError, match='classes without images in .*val: watch'):
        scan_folder(folder)


def test_folders_that_cannot_be_trained_on(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match='no folder at .*nowhere'):
        scan_folder(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty holds no class folders'):
        scan_folder(tmp_path / 'empty')
    (tmp_path / 'empty' / 'pizza').mkdir()
    with pytest.raises(ValueError, match=r'holds one class only \(pizza\); at least two are needed'):
        scan_folder(tmp_path / 'empty')
    (folder / 'watch').mkdir()
    with pytest.raises(ValueError, match='classes without images in .*: watch'):
        scan_folder(folder)
    (folder / 'watch' / 'one.jpg').write_bytes((folder / 'pizza' / 'image_0001.jpg').read_bytes())
    with pytest.raises(ValueError, match='classes with a single image cannot be split: watch'):
        split_files(scan_folder(folder).train, 0.3, seed=0)


def test_corruptions_are_what_they_say():
    image = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    noise = corrupt(image, 'noise', 16.).float() - 128
    assert noise.std().item() == pytest.approx(16, rel=0.03) and abs(noise.mean().item()) < 0.5
    assert torch.equal(corrupt(image, 'noise', 16.), corrupt(image, 'noise', 16.))
    point = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    point[:, :, 16, 16] = 255
    blurred = corrupt(point, 'blur', 1.)[0, 0].float()
    assert blurred[16, 17] / blurred[16, 16] == pytest.approx(math.exp(-0.5), rel=0.05)  # a Gaussian of one pixel
    picture = F.interpolate(torch.rand(1, 3, 6, 6) * 255, 32, mode='bicubic').clamp(0, 255).byte()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # torchvision will drop its codec
        theirs = v2.functional.jpeg(picture, 50)
    assert (corrupt(picture, 'jpeg', 50).float() - theirs.float()).abs().mean() < 2
    assert (picture.float() - theirs.float()).abs().mean() > 2
    with pytest.raises(ValueError, match="corruption 'fog' is unknown; choose one of noise, blur, jpeg"):
        corrupt(image, 'fog', 1.)
