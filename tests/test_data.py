"""Images as they are read, split, held on the device and augmented."""
import csv
import math
import os
import pickle
import shutil
import sys
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLE, data_dir
from PIL import EpsImagePlugin, Image, ImageFile
from torchvision import datasets as tv
from torchvision.transforms import v2

from wrn_timm.data import images as image_files
from wrn_timm.data import small_sets as datasets
from wrn_timm.data.corrupt import corrupt
from wrn_timm.data.folders import FolderScan, examine, list_csv, list_folder
from wrn_timm.data.images import ImageFiles, ReadableOnly, collate_readable, looks_like_image, read_rgb
from wrn_timm.data.on_device import DeviceLoader
from wrn_timm.data.splits import data_name, list_source, make_split, read_split, source_root, split_files, write_split
from wrn_timm.data.timm_sets import NamedImages, is_named
from wrn_timm.recipes import FinetuneConfig


def arrays(n=64, size=32):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    return datasets.ImageArrays(images, torch.arange(n) % 10, tuple('abcdefghij'), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def raw(data, images):
    """Normalised images as they were, uint8."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    return ((images * std + mean) * 255).round().byte()


def test_batches_without_augmentation_are_the_normalised_images():
    data = arrays()
    loader = DeviceLoader(data, 16, 'cpu', pad=0, flip=False)
    seen = []
    for images, labels in loader.epoch(0):
        for image, label in zip(raw(data, images), labels, strict=True):
            index = (data.images == image).flatten(1).all(1).nonzero().item()
            assert data.labels[index] == label
            seen.append(index)
    assert sorted(seen) == list(range(64))


def test_crop_and_flip_are_windows_of_the_reflected_image():
    data = arrays(8)
    loader = DeviceLoader(data, 8, 'cpu')
    images, _ = next(loader.epoch(0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    padded = F.pad(data.images.float(), [4] * 4, mode='reflect').byte()
    kinds = set()
    for image in raw(data, images):
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


def test_alternate_flip_mirrors_each_image_in_every_second_epoch():
    data = arrays(1000, size=4)
    plain = DeviceLoader(data, 1000, 'cpu', pad=0, flip=False)
    loader = DeviceLoader(data, 1000, 'cpu', pad=0, alternate_flip=True)
    first = None
    for epoch in range(4):
        (images, _), (same, _) = next(loader.epoch(epoch)), next(plain.epoch(epoch))
        mirrored = (images == same.flip(3)).flatten(1).all(1)
        assert torch.equal(mirrored, ~(images == same).flatten(1).all(1))
        of_image = torch.empty(1000, dtype=torch.bool)
        of_image[[(data.images == x).flatten(1).all(1).nonzero().item() for x in raw(data, same)]] = mirrored
        first = of_image if first is None else first
        assert torch.equal(of_image, first ^ bool(epoch % 2))
        assert 400 < mirrored.sum() < 600


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
    root = data_dir('cifar10')
    data, official = datasets.load('cifar10', root, train=False), tv.CIFAR10(root, train=False)
    assert torch.equal(data.images.permute(0, 2, 3, 1), torch.from_numpy(official.data))
    assert data.labels.tolist() == official.targets and list(data.classes) == official.classes


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'cifar10: the official files under {tmp_path} are incomplete'):
        datasets.load('cifar10', tmp_path, train=True)
    with pytest.raises(ValueError, match="data set 'cifar' is unknown; choose one of cifar10"):
        datasets.load('cifar', tmp_path, train=True)
    with pytest.raises(ValueError, match="data 'cifar10' is not NAME:DIR"):
        datasets.parse_spec('cifar10')


@pytest.mark.parametrize('names', [
    ('seg_train', 'seg_test'), ('training_set', 'test_set'), ('train', 'eval'), ('val', 'test')])
def test_parts_by_other_names_are_not_taken_for_classes(folder, tmp_path, names):
    for name in names:
        shutil.copytree(folder, tmp_path / 'parts' / name)
    with pytest.raises(ValueError, match=r'both hold ketch, pizza: .* rename them to train and test \(or val\)'):
        list_folder(tmp_path / 'parts')
    assert len(list_folder(tmp_path / 'parts', nested=True).train.classes) == 4


def test_parts_of_different_depth_are_not_taken_for_classes(folder, tmp_path):
    """As archives of competitions have them: a folder twice, and test photographs without classes."""
    photo = next(folder.glob('*/*.jpg'))
    for name in ('seg_train', 'seg_test'):
        shutil.copytree(folder, tmp_path / 'twice' / name / name)
    with pytest.raises(ValueError, match='seg_test and .*seg_train look like parts of a split: if they are, rename'):
        list_folder(tmp_path / 'twice')
    for name, message in (('test1', 'test1 and .*train look like parts of a split: if'),
                          ('unlabeled', 'train looks like the training part of a split, but unlabeled beside it')):
        shutil.copytree(folder, tmp_path / name / 'train')
        (tmp_path / name / name).mkdir()
        shutil.copy(photo, tmp_path / name / name)
        with pytest.raises(ValueError, match=message):
            list_folder(tmp_path / name)
    for name in ('train', 'car'):  # a class of that name holds its photographs itself
        (tmp_path / 'vehicles' / name).mkdir(parents=True)
        shutil.copy(photo, tmp_path / 'vehicles' / name)
    assert list_folder(tmp_path / 'vehicles').train.classes == ('car', 'train')


def test_a_test_split_without_labels_is_refused(monkeypatch):
    """As many of the Hub are: the labels are -1."""
    class Secret(list):
        classes = ['a', 'b']

    made = {split: Secret([(Image.new('RGB', (8, 8)), label)]) for split, label in (('train', 1), ('test', -1))}
    monkeypatch.setattr('wrn_timm.data.timm_sets.create_dataset', lambda name, split, **kwargs: made[split])
    assert NamedImages('hfds/x', 'train').classes == ('a', 'b')
    with pytest.raises(ValueError, match=r"first image of the split 'test' has the label -1, .* choose other --parts"):
        NamedImages('hfds/x', 'test')


def test_kaggles_names_of_the_parts(folder, tmp_path):
    for name in ('Training', 'Testing'):
        shutil.copytree(folder, tmp_path / 'parts' / name)
    scan = list_folder(tmp_path / 'parts')
    assert scan.train.classes == scan.test.classes == ('ketch', 'pizza')


@pytest.fixture
def folder(tmp_path):
    """Two classes with three photographs each."""
    for name in ('pizza', 'ketch'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for p in sorted((SAMPLE / name).iterdir())[:3]:
            (tmp_path / 'data' / name / p.name).write_bytes(p.read_bytes())
    return tmp_path / 'data'


def test_scan_of_the_sample():
    scan = examine(list_folder(SAMPLE))
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


@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'CMYK', 'I;16'])
def test_uncompressed_tiff_is_turned_too(tmp_path, mode):
    """Pillow reads these from mapped memory, where rotation is another matter."""
    grey = np.arange(32, dtype=np.uint8).reshape(4, 8) * 8
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / 'plain.tif')
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / 'turned.tif', exif=exif)
    plain, turned = (np.asarray(read_rgb(tmp_path / f'{name}.tif')) for name in ('plain', 'turned'))
    np.testing.assert_array_equal(plain, np.stack([grey] * 3, 2))
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


def test_large_photographs_are_decoded_at_a_part_of_their_size(tmp_path):
    photograph = read_rgb(min((SAMPLE / 'ketch').iterdir())).resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photograph.save(tmp_path / 'large.jpg', quality=95, exif=exif)
    photograph.save(tmp_path / 'large.png')
    for least, size in ((1201, (1200, 1600)), (400, (600, 800)), (90, (150, 200)), (1, (150, 200))):
        reduced = read_rgb(tmp_path / 'large.jpg', least)
        assert reduced.size == size
        whole = read_rgb(tmp_path / 'large.jpg').resize(size, Image.Resampling.BOX)
        assert np.abs(np.asarray(reduced, float) - np.asarray(whole, float)).mean() < 2  # of 255
    assert read_rgb(tmp_path / 'large.png', 90).size == (1600, 1200)
    dataset = list_folder(SAMPLE).train.as_dataset(lambda image: image.size, least=20)
    assert all(20 <= min(dataset[i][0]) <= 160 for i in range(0, len(dataset), 24))


def test_decoded_images_that_are_kept_are_those_of_the_files(folder):
    (folder / 'pizza' / 'cut.jpg').write_bytes((folder / 'pizza' / 'image_0001.jpg').read_bytes()[:999])
    files = list_folder(folder).train
    whole = {i: np.asarray(read_rgb(path)) for i, path in enumerate(files.paths) if 'cut' not in path}
    dataset = files.as_dataset(np.asarray, memory=sum(pixels.nbytes for pixels in whole.values()) - 1)
    last = max(whole)
    Path(files.paths[last]).rename(folder / 'moved')
    for path in list(files.paths)[:last]:
        os.remove(path)
    shared = pickle.loads(pickle.dumps(dataset))  # as processes get it that are not forked
    for i in whole.keys() - {last}:
        assert np.array_equal(dataset[i][0], whole[i]) and np.array_equal(shared[i][0], whole[i])
    with pytest.raises(ValueError, match='cut.jpg does not exist'):
        dataset[next(i for i, path in enumerate(files.paths) if 'cut' in path)]
    with pytest.raises(ValueError, match='does not exist'):
        dataset[last]  # did not fit
    (folder / 'moved').rename(files.paths[last])
    assert np.array_equal(dataset[last][0], whole[last])


def test_keeping_decoded_images_takes_little_more_than_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    for name in 'ab':
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new('RGB', (1000, 1000), (i, 0, 0)).save(tmp_path / name / f'{i:02}.png')
    files = list_folder(tmp_path).train
    tracemalloc.start()
    dataset = files.as_dataset(np.asarray, memory=10e6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [dataset.kept.get(i) is None for i in range(40)] == [False] * 3 + [True] * 37
    assert peak < 40e6


def test_bad_files_are_skipped_and_named_or_refused(folder):
    (folder / 'pizza' / 'notes.txt').write_text('no image')
    (folder / 'pizza' / 'empty.jpg').write_bytes(b'')
    whole = (folder / 'pizza' / 'image_0001.jpg').read_bytes()
    (folder / 'pizza' / 'cut, "off" é.jpg').write_bytes(whole[:len(whole) // 2])
    (folder / 'pizza' / '.DS_Store').write_bytes(b'x')
    scan = examine(list_folder(folder))
    assert len(scan.train) == 6 and len(scan.bad) == 3
    assert any('notes.txt is not an image' in b for b in scan.bad)
    assert any('cut, "off" é.jpg cannot be read: image file is truncated' in b for b in scan.bad)
    with pytest.raises(ValueError, match='3 files cannot be read: .*empty.jpg is not an image'):
        examine(list_folder(folder), 'fail')


def test_given_split_is_kept_and_the_classes_must_agree(folder):
    (folder / 'train').mkdir()
    (folder / 'val').mkdir()
    with pytest.raises(ValueError, match='but also ketch, pizza'):
        examine(list_folder(folder))
    for name in ('pizza', 'ketch'):
        shutil.rmtree(folder / name)
    for part in ('train', 'val'):
        for name in ('pizza', 'ketch'):
            (folder / part / name).mkdir()
            for p in sorted((SAMPLE / name).iterdir())[:2 if part == 'train' else 1]:
                (folder / part / name / p.name).write_bytes(p.read_bytes())
    scan = examine(list_folder(folder))
    assert (len(scan.train), len(scan.test)) == (4, 2)
    (folder / 'val' / 'watch').mkdir()
    with pytest.raises(ValueError, match='classes without images in .*val: watch'):
        examine(list_folder(folder))
    shutil.copy(folder / 'val' / 'pizza' / 'image_0001.jpg', folder / 'val' / 'watch')
    with pytest.raises(ValueError, match='classes in test but not in train: watch; add images'):
        examine(list_folder(folder))
    shutil.move(folder / 'val' / 'watch', folder / 'train' / 'watch')
    scan = examine(list_folder(folder))
    assert scan.test.classes == scan.train.classes == ('ketch', 'pizza', 'watch') and set(scan.test.labels) == {0, 1}
    assert 'not in the test part: watch' in scan.summary()
    shutil.copytree(folder / 'val', folder / 'test')
    scan = examine(list_folder(folder))
    assert (len(scan.train), len(scan.val), len(scan.test)) == (5, 2, 2)
    split = make_split(scan, holdout=0.5)  # what is given is not split again
    assert split.holdout == scan.val and split.train == scan.train
    assert len(split.leaks(scan.twins)) == 2


def test_labels_of_a_part_that_lacks_a_class_are_those_of_training(tmp_path):
    parts = {'train': ('ketch', 'pizza', 'watch'), 'val': ('ketch', 'watch'), 'test': ('pizza', 'watch')}
    for part, names in parts.items():
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            shutil.copy(SAMPLE / name / 'image_0001.jpg', tmp_path / part / name)
    for part in list_folder(tmp_path).parts().values():
        assert [part.classes[label] for label in part.labels] == [Path(path).parent.name for path in part.paths]


def test_folders_without_images_beside_train_are_left_out(folder):
    for part in ('train', 'val'):
        shutil.copytree(folder / 'pizza', folder / part / 'pizza')
        shutil.copytree(folder / 'ketch', folder / part / 'ketch')
    shutil.rmtree(folder / 'pizza')
    (folder / 'ketch').rename(folder / 'more')
    (folder / '__pycache__').mkdir()
    (folder / 'Logs' / 'deep').mkdir(parents=True)
    (folder / 'Logs' / 'deep' / 'log.txt').write_text('no image')
    with pytest.raises(ValueError, match='holds train/ and val/, but also more with images; move these'):
        list_folder(folder)
    shutil.rmtree(folder / 'more')
    scan = examine(list_folder(folder))
    assert (len(scan.train), len(scan.test), scan.train.classes) == (6, 6, ('ketch', 'pizza'))
    assert scan.summary()[0] == 'no images in __pycache__, logs beside train/: left out'
    shutil.rmtree(folder / 'val')
    scan = list_folder(folder)
    assert (len(scan.train), scan.test, scan.train.classes) == (6, None, ('ketch', 'pizza'))
    assert scan.notes == ('no images in __pycache__, logs beside train/: left out',)


def test_folders_that_cannot_be_trained_on(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match='no folder at .*nowhere'):
        examine(list_folder(tmp_path / 'nowhere'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty holds no class folders'):
        examine(list_folder(tmp_path / 'empty'))
    (tmp_path / 'empty' / 'pizza').mkdir()
    with pytest.raises(ValueError, match='classes without images in .*: pizza'):
        examine(list_folder(tmp_path / 'empty'))
    (folder / 'watch').mkdir()
    with pytest.raises(ValueError, match='classes without images in .*: watch'):
        examine(list_folder(folder))
    (folder / 'watch' / 'one.jpg').write_bytes((folder / 'pizza' / 'image_0001.jpg').read_bytes())
    with pytest.raises(ValueError, match='classes with a single image cannot be split: watch'):
        split_files(examine(list_folder(folder)).train, 0.3, seed=0)


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


def test_links_are_followed_but_where_they_loop(folder):
    (folder / 'linked').symlink_to(SAMPLE / 'watch', target_is_directory=True)
    (folder / 'pizza' / 'up').symlink_to(folder, target_is_directory=True)
    (folder / 'loop').symlink_to(folder, target_is_directory=True)
    (folder / 'ketch' / 'self.jpg').symlink_to(folder / 'ketch' / 'self.jpg')
    scan = examine(list_folder(folder))
    assert scan.train.classes == ('ketch', 'linked', 'pizza')
    assert [scan.train.labels.count(i) for i in range(3)] == [3, 30, 3]
    assert len(scan.bad) == 3 and 'self.jpg cannot be read' in scan.bad[2]
    assert sum('links to a folder that contains it' in b for b in scan.bad) == 2


def test_nested_folders_are_of_the_class_above_or_classes_of_their_own(tmp_path):
    names = ('land/sun flower', 'land/pizza', 'sea/ketch')
    for name, source in zip(names, ('sunflower', 'pizza', 'ketch'), strict=True):
        shutil.copytree(SAMPLE / source, tmp_path / name)
    assert list_folder(tmp_path).train.classes == ('land', 'sea')
    files = list_folder(tmp_path, nested=True).train
    assert files.classes == ('land/pizza', 'land/sun flower', 'sea/ketch') and len(files) == 90
    assert all(files.classes[i] in p for i, p in zip(files.labels, files.paths, strict=True))
    (tmp_path / 'land' / 'Thumbs.db').write_bytes(b'of another program')
    (tmp_path / 'sea' / 'ketch' / 'notes.txt').write_text('left out, with a word')
    scan = examine(list_folder(tmp_path, nested=True))
    assert scan.train == files and len(scan.bad) == 1


def test_csv_of_any_names(tmp_path):
    source = (SAMPLE / 'pizza' / 'image_0001.jpg').read_bytes()
    names = ['=f.jpg', 'comma, "quote".jpg', "l'été 鳥.jpg", 'x\ny.jpg']
    for name in names:
        (tmp_path / name).write_bytes(source + name.encode())  # bytes after the end of a JPEG are not read
    with open(tmp_path / 'list.csv', 'w', newline='', encoding='utf-8-sig') as f:
        writer = csv.writer(f)
        writer.writerow(['label', 'path'])
        writer.writerows([f'class {i % 2}, "q"', name] for i, name in enumerate([*names, 'gone.jpg']))
    scan = examine(list_source(str(tmp_path / 'list.csv')))
    assert list(scan.train.paths) == [str(tmp_path / n) for n in names]
    assert scan.train.classes == ('class 0, "q"', 'class 1, "q"') and scan.train.labels == (0, 1, 0, 1)
    assert scan.bad == (f'{tmp_path}/gone.jpg does not exist',)
    split = make_split(scan, '50-50')
    (tmp_path / 'split.csv').write_text(write_split(split, tmp_path))
    assert read_split(tmp_path / 'split.csv', tmp_path) == split
    rows = [row for row in csv.reader((tmp_path / 'split.csv').read_text().splitlines()) if row]
    assert not any(cell.startswith('=') for row in rows for cell in row) and any("'=f.jpg" in row for row in rows)
    (tmp_path / 'split.csv').write_text((tmp_path / 'split.csv').read_text() + 'test,zebra,x.jpg\n')
    with pytest.raises(ValueError, match='split.csv names no training files of zebra'):
        read_split(tmp_path / 'split.csv', tmp_path)


@pytest.mark.parametrize(('text', 'message'), [
    ('path,name\na.jpg,x\n', 'has no column label; its first line must name'),
    ('path,label\na.jpg\n', r"line 2: expected path, label and split .* found path='a.jpg', label=None"),
    ('path,label,split\na.jpg,x,valley\n', "split='valley'"),
    ('path,label\n', 'names no files'),
    ('path,label\na,b.jpg,x\n', r"line 2: .* found path='a', label='b.jpg', and \['x'\]"),
    ('path,label\na.jpg,x\n"b.jpg,y\n' + 'c.jpg,y\n' * 20_000, r'x.csv, line \d+: field larger than field limit .*; '
     'look there and in the lines above for an unclosed quotation mark'),
    ('path,label,split\na.jpg,x,train\nb.jpg,y,train\nc.jpg,z,test\n', 'classes in test but not in train: z'),
])
def test_csv_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / 'x.csv').write_text(text)
    with pytest.raises(ValueError, match=message):
        list_csv(tmp_path / 'x.csv')


def test_csv_of_absolute_and_relative_paths(folder, monkeypatch):
    """The first absolute and the last relative, to a CSV that is itself named by a relative path."""
    monkeypatch.chdir(folder)
    rows = [f'{folder}/pizza/image_0001.jpg,pizza', 'pizza/image_0002.jpg,pizza', 'ketch/image_0001.jpg,ketch',
            f'{folder}/ketch/image_0002.jpg,ketch', 'ketch/image_0003.jpg,ketch']
    Path('list.csv').write_text('\n'.join(['path,label', *rows]))
    scan = examine(list_source('list.csv'))
    assert len(scan.train) == 5 and not scan.bad
    split = make_split(scan, '50-50')
    Path('split.csv').write_text(write_split(split, source_root('list.csv')))
    assert read_split('split.csv', source_root('list.csv')) == split


@pytest.mark.parametrize(('line', 'message'), [
    ('tset,ketch,x.jpg', r"split.csv, line 12: expected part \(train, holdout, test\), .* found part='tset', "),
    (',ketch,x.jpg', "found part='', "), ('test,ketch', 'path=None'), ('test,,x.jpg', "label=''"),
    ('test,ketch,x,y.jpg', r"path='x', and \['y.jpg'\]"), ('"' + 'x' * 150_000, r'line 12: field larger'),
])
def test_a_split_with_a_line_that_is_wrong(tmp_path, folder, line, message):
    text = write_split(make_split(list_folder(folder), '50-50'), folder)
    filler = text.splitlines()[1]
    lines = [*text.splitlines(), *[filler] * (10 - len(text.splitlines()) + 1)]
    (tmp_path / 'split.csv').write_text('\n'.join([*lines, line, '']))
    with pytest.raises(ValueError, match=message):
        read_split(tmp_path / 'split.csv', folder)


def test_same_content_is_found_within_and_across_parts(folder):
    shutil.copy(folder / 'pizza' / 'image_0001.jpg', folder / 'pizza' / 'again.jpg')
    shutil.copy(folder / 'pizza' / 'image_0001.jpg', folder / 'ketch' / 'wrong.jpg')
    scan = examine(list_folder(folder))
    assert [{os.path.basename(p) for p in g} for g in scan.twins] == [{'again.jpg', 'image_0001.jpg', 'wrong.jpg'}]
    assert any(line.startswith('same content in several classes, 1: ') for line in scan.summary())
    for seed in range(5):
        split = make_split(scan, '50-50', seed=seed)
        known, test = ({p for p in part.paths if p in scan.twins[0]} for part in (split.train, split.test))
        leaks = split.leaks(scan.twins)
        assert {path for _, path in leaks} == (test if known else set())
        assert all(source in known for source, _ in leaks)


@pytest.mark.parametrize(('protocol', 'train', 'test'), [
    ('first20', 160, 80), ('random20', 160, 80), ('80-20', 192, 48), ('70-30', 168, 72)])
def test_protocols(protocol, train, test):
    scan = list_folder(SAMPLE)
    split = make_split(scan, protocol, seed=1)
    assert (len(split.train), len(split.test), split.holdout) == (train, test, None)
    assert {*split.train.paths, *split.test.paths} == set(scan.train.paths)
    assert {split.train.labels.count(i) for i in range(8)} == {train // 8}
    by_name = [sorted(p.name for p in (SAMPLE / c).iterdir())[:20] for c in scan.train.classes]
    first = [os.path.basename(p) for p in split.train.paths] == [n for names in by_name for n in names]
    assert first == (protocol == 'first20')
    assert (make_split(scan, protocol, seed=2) == split) == first
    smaller = make_split(scan, protocol, holdout=0.1, seed=1)
    assert smaller.test == split.test and {smaller.holdout.labels.count(i) for i in range(8)} == {2}
    assert {*smaller.train.paths, *smaller.holdout.paths} == set(split.train.paths)
    assert len(smaller.train) + len(smaller.holdout) == train


@pytest.mark.parametrize('enough', [16, 17])
def test_files_are_held_out_where_a_tenth_is_enough_to_choose_by(monkeypatch, enough):
    monkeypatch.setattr('wrn_timm.data.splits.ENOUGH_TO_CHOOSE', enough)
    scan = list_folder(SAMPLE)
    split = make_split(scan, '70-30', holdout='auto')  # a tenth of 21 files of each of 8 classes
    assert (len(split.train), split.holdout and len(split.holdout)) == ((152, 16) if enough == 16 else (168, None))
    assert split.test == make_split(scan, '70-30').test


def test_one_of_each_of_many_classes_is_no_tenth():
    files = ImageFiles.of([(f'{c}/{i}.jpg', f'{c:03}') for c in range(120) for i in range(10)])
    held_out = [make_split(FolderScan(files), protocol, 'auto').holdout for protocol in ('random5', 'random9')]
    assert held_out[0] is None and len(held_out[1]) == 120  # a tenth of 600 is 60, and of 1,080 it is 108


def test_early_stopping_holds_files_out_however_few():
    scan = list_folder(SAMPLE)
    given = {FinetuneConfig(patience=p, holdout=h).held_out: p for p, h in ((0, 'auto'), (3, 'auto'), (3, 0.2))}
    assert [make_split(scan, '70-30', share).holdout is not None for share in given] == [False, True, True]


def test_protocols_that_cannot_be():
    scan = list_folder(SAMPLE)
    for bad in ('first', 'random0', '80-30', '100-0', 'first30.csv'):
        with pytest.raises(ValueError, match=f"split '{bad}' is unknown; choose first30 or random30"):
            make_split(scan, bad)
    with pytest.raises(ValueError, match=r'need 31; these classes have fewer: airplanes \(30\), .* and 3 more'):
        make_split(scan, 'random30')


def test_caltech101_is_found_where_torchvision_puts_it_and_has_no_background(tmp_path):
    categories = tmp_path / 'caltech101' / '101_ObjectCategories'
    for name, source in (('accordion', 'pizza'), ('ant', 'watch'), ('BACKGROUND_Google', 'ketch')):
        shutil.copytree(SAMPLE / source, categories / name)
    (categories / 'BACKGROUND_Google' / 'tmp').write_text('')
    for root in (tmp_path, tmp_path / 'caltech101', categories):
        assert source_root(f'caltech101:{root}') == categories
        scan = examine(list_source(f'caltech101:{root}'), 'fail')
        assert scan.train.classes == ('accordion', 'ant') and len(scan.train) == 60
        assert scan.summary()[0] == 'BACKGROUND_Google is left out (31 files): it is not an object'
    with pytest.raises(FileNotFoundError, match='no 101_ObjectCategories .* or add --download'):
        list_source(f'caltech101:{tmp_path / "nowhere"}')


def test_a_split_of_other_data(tmp_path):
    (tmp_path / 'x.csv').write_text('path,label\na,b\n')
    with pytest.raises(ValueError, match='is not the split.csv of a run'):
        read_split(tmp_path / 'x.csv', tmp_path)
    split = make_split(list_folder(SAMPLE), holdout=0.2)
    (tmp_path / 'split.csv').write_text(write_split(split, SAMPLE))
    assert read_split(tmp_path / 'split.csv', SAMPLE) == split
    assert 'train,pizza,pizza/image_' in (tmp_path / 'split.csv').read_text()
    with pytest.raises(FileNotFoundError, match='does not exist, .*; give the --data that it was made from'):
        read_split(tmp_path / 'split.csv', tmp_path)
    (tmp_path / 'pizza').mkdir()
    shutil.copy(next(p for p in split.train.paths if 'pizza' in p), tmp_path / 'pizza')
    assert len(read_split(tmp_path / 'split.csv', tmp_path).train) == len(split.train)  # others are missed when read


def test_a_large_holdout_leaves_a_training_file_in_each_class():
    files = ImageFiles([f'{i}.jpg' for i in range(44)], [0] * 4 + [1] * 40, ('few', 'many'))
    split = make_split(FolderScan(files), '75-25', holdout=0.9)
    assert (Counter(split.train.labels), Counter(split.holdout.labels)) == ({0: 1, 1: 3}, {0: 2, 1: 27})


def test_a_file_that_goes_away_is_named_and_its_batch_goes_on(folder):
    files = list_folder(folder).train
    data = ReadableOnly(files.as_dataset(lambda image: torch.zeros(3)))
    os.remove(files.paths[1])
    images, labels, index, reasons = collate_readable([data[i] for i in range(3)])
    assert images.shape == (2, 3) and labels.tolist() == [0, 0] and index.tolist() == [0, 2]
    assert reasons == [f'{files.paths[1]} does not exist']
    assert collate_readable([data[1]]) == (None, None, None, reasons)


def test_an_image_too_large_to_decode_safely(tmp_path):
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'x.png')
    with pytest.raises(ValueError, match='x.png cannot be read: Image size .400000000 pixels. exceeds limit'):
        read_rgb(tmp_path / 'x.png')


@pytest.mark.parametrize('size', [(20_000_000, 1), (1, 400_000), (3001, 30)])
def test_a_line_is_refused_before_it_is_decoded(folder, monkeypatch, size):
    """20,000,000 x 1 at 32 px would be 640,000,000 x 32: from a file of 60 KB."""
    line = folder / 'pizza' / 'line.png'
    Image.new('1', size).save(line)
    Image.new('1', (3000, 30)).save(folder / 'ketch' / 'longest.png')
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: pytest.fail('it was decoded'))
    reason = f'line.png cannot be read: it is {size[0]:,} x {size[1]:,} pixels; one side may be at most 100 times as'
    with pytest.raises(ValueError, match=reason):
        read_rgb(line)
    monkeypatch.undo()
    scan = examine(list_folder(folder))
    assert len(scan.bad) == 1 and reason in scan.bad[0] and len(scan.train) == 7


def test_no_other_decoder_is_reached(tmp_path, monkeypatch):
    """That of EPS would run Ghostscript, here one that leaves a trace."""
    (tmp_path / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/trace\n')
    (tmp_path / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)  # looked for anew
    for name in ('a.jpg', 'a.eps'):
        Image.new('RGB', (8, 8)).save(tmp_path / name, 'EPS')
    with pytest.raises(ValueError, match='a.jpg is not an image$'):
        read_rgb(tmp_path / 'a.jpg')
    with pytest.raises(ValueError, match=r'a.eps is not an image in a supported format \(.*BMP, GIF, .*JPEG'):
        read_rgb(tmp_path / 'a.eps')
    assert not (tmp_path / 'trace').exists()
    with pytest.raises(OSError), Image.open(tmp_path / 'a.eps') as image:
        image.load()  # what is kept off works
    assert (tmp_path / 'trace').exists()


@pytest.mark.parametrize('form', ['BMP', 'GIF', 'JPEG', 'MPO', 'PNG', 'PPM', 'TIFF', 'WEBP'])
def test_formats_of_photographs(tmp_path, form):
    file = tmp_path / f'x.{ {"JPEG": "jpg", "MPO": "mpo"}.get(form, form.lower())}'
    Image.new('RGB', (8, 8), 'white').save(file, form)
    assert looks_like_image(file) and np.asarray(read_rgb(file)).min() > 250
    assert not looks_like_image(tmp_path / 'x.eps') and not looks_like_image(tmp_path / 'x.txt')


def test_many_files_are_listed_in_little_memory(tmp_path):
    """A million files fit in memory where each takes little more than its own name."""
    (tmp_path / 'file').write_text('')
    for c in range(5):
        (tmp_path / 'data' / f'class{c}').mkdir(parents=True)
        for i in range(1000):
            os.link(tmp_path / 'file', tmp_path / 'data' / f'class{c}' / f'{i:07d}.jpg')
    tracemalloc.start()
    files = list_folder(tmp_path / 'data').train
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    length = len(files.paths[0])
    assert len(files) == 5000 and files.paths[4321].endswith('class4/0000321.jpg')
    assert held / 5000 < length + 30  # as strings: length + 57
    assert examine(list_folder(tmp_path / 'data'), at_most=4999).examined is False


def test_the_first_of_a_class_are_so_by_name(tmp_path):
    """In a CSV, whose rows may be in any order."""
    names = ['c.jpg', 'a.jpg', 'd.jpg', 'b.jpg']
    rows = [f'{label}/{n},{label}' for label in 'xy' for n in names]
    (tmp_path / 'list.csv').write_text('\n'.join(['path,label', *rows]))
    split = make_split(list_source(str(tmp_path / 'list.csv')), 'first2')
    assert [Path(p).name for p in split.train.paths] == ['a.jpg', 'b.jpg'] * 2


def test_a_photograph_has_one_label(tmp_path):
    """Of a CSV with a line per label."""
    file, good = tmp_path / 'list.csv', ['a.jpg,x', 'b.jpg,x', 'c.jpg,y', 'd.jpg,y']
    file.write_text('\n'.join(['path,label', *good, 'a.jpg,x']))
    scan = list_source(str(file))
    assert len(scan.train) == 4 and '1 line with a photograph that is listed already: left out' in scan.notes
    file.write_text('\n'.join(['path,label', *good, 'b.jpg,y']))
    with pytest.raises(ValueError, match='list.csv, line 6: b.jpg is labelled y, but x further up'):
        list_source(str(file))


def test_files_beside_photographs_that_are_too_many_to_examine(tmp_path):
    for label in 'xy':
        (tmp_path / label).mkdir()
        for name in ('1.jpg', '1.txt', '2.PNG', 'Thumbs.db'):
            (tmp_path / label / name).write_bytes(b'')
    scan = examine(list_folder(tmp_path), at_most=5)
    assert [os.path.basename(p) for p in scan.train.paths] == ['1.jpg', '2.PNG'] * 2
    assert any('4 files do not have the suffix of an image' in line for line in scan.summary())


def test_photographs_of_a_telephone(tmp_path, monkeypatch):
    """HEIF is read with its package, and named where that is missing."""
    file, registered = tmp_path / 'IMG_1.HEIC', []
    file.write_bytes(b'....ftypheic')
    assert looks_like_image(file)
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    image_files._decoders.cache_clear()
    with pytest.raises(ValueError, match='IMG_1.HEIC is an HEIF image, which needs the package pillow-heif'):
        read_rgb(file)
    monkeypatch.setitem(sys.modules, 'pillow_heif', SimpleNamespace(
        register_heif_opener=lambda: registered.append(True)))
    image_files._decoders.cache_clear()
    with pytest.raises(ValueError, match='IMG_1.HEIC'):
        read_rgb(file)
    image_files._decoders.cache_clear()
    assert registered


def test_what_a_source_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('torch/flowers').mkdir(parents=True)
    assert data_name('birds.v2') == 'birds.v2' and data_name('lists/birds.v2.csv') == 'birds.v2'
    assert data_name('caltech101:x') == 'caltech101'
    assert is_named('torch/cifar10') and not is_named('torch/flowers')  # a folder of that name is a folder
