"""Data sets with boxes as people have them, each recognised without options and read to the same boxes."""
import io
import json
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from PIL import Image

from wrn_timm.data.boxes import data_folder, divide, read_box_split, read_boxes, write_box_split

BOXES = {'a': [('cat', (2, 3, 20, 25)), ('dog', (10, 0, 40, 30))], 'b': [('dog', (0, 0, 8, 8))], 'c': [],
         'd': [('cat', (5, 5, 15, 25))]}
WIDTH, HEIGHT = 40, 30


def images(folder, names=BOXES, suffix='.jpg'):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new('RGB', (WIDTH, HEIGHT), (8 * i, 40, 200)).save(folder / f'{name}{suffix}')


def xml(name, suffix='.jpg', size=(WIDTH, HEIGHT)):
    objects = ''.join(
        f'<object><name>{label}</name><bndbox>' + ''.join(
            f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True))
        + '</bndbox></object>' for label, box in BOXES[name])
    return (f'<annotation><filename>{name}{suffix}</filename><size><width>{size[0]}</width><height>{size[1]}</height>'
            f'</size>{objects}</annotation>')


def voc(root, annotations='Annotations', folder='JPEGImages', suffix='.jpg', lists=()):
    images(root / folder, suffix=suffix)
    (root / annotations).mkdir(parents=True, exist_ok=True)
    for name in BOXES:
        (root / annotations / f'{name}.xml').write_text(xml(name, suffix))
    for part, names in dict(lists).items():
        (root / 'ImageSets/Main').mkdir(parents=True, exist_ok=True)
        (root / f'ImageSets/Main/{part}.txt').write_text('\n'.join(names) + '\n')
    return root


def coco(names=BOXES):
    rows = [(i, label, box) for i, name in enumerate(names) for label, box in BOXES[name]]
    return {
        'images': [{'id': i, 'file_name': f'{name}.jpg', 'width': WIDTH, 'height': HEIGHT}
                   for i, name in enumerate(names)],
        'categories': [{'id': 0, 'name': 'animals'}, {'id': 3, 'name': 'dog'}, {'id': 7, 'name': 'cat'}],
        'annotations': [{'id': n, 'image_id': i, 'category_id': {'dog': 3, 'cat': 7}[label],
                         'bbox': [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
                        for n, (i, label, box) in enumerate(rows)]}


def yolo_lines(name):
    lines = []
    for label, (x0, y0, x1, y1) in BOXES[name]:
        box = (x0 + x1) / 2 / WIDTH, (y0 + y1) / 2 / HEIGHT, (x1 - x0) / WIDTH, (y1 - y0) / HEIGHT
        lines.append(' '.join(map(str, (['dog', 'cat'].index(label), *box))))
    return '\n'.join(lines)


def yolo(root, parts=('',)):
    for part in parts:
        images(root / 'images' / part)
        (root / 'labels' / part).mkdir(parents=True)
        for name in BOXES:
            if BOXES[name]:
                (root / 'labels' / part / f'{name}.txt').write_text(yolo_lines(name))
    return root


def as_voc(root):
    return voc(root)


def as_voc_with_other_names_and_png(root):
    return voc(root, 'annotations', 'images', '.png')


def as_xml_beside_images(root):
    return voc(root, '', '')


def as_coco_in_one_folder(root):
    images(root)
    (root / 'some.json').write_text(json.dumps(coco()))
    return f'coco:{root}/some.json'


def as_coco_with_images_beside(root):
    images(root / 'images')
    (root / 'annotations.json').write_text(json.dumps(coco()))
    return root


def as_coco_written_on_windows(root):
    images(root / 'images')
    found = coco()
    for row in found['images']:
        row['file_name'] = f"images\\{row['file_name']}"
    (root / 'annotations.json').write_text(json.dumps(found), encoding='utf-8-sig')
    return root


def as_yolo_written_on_windows(root):
    for file in (yolo(root) / 'labels').iterdir():
        file.write_text(file.read_text(), encoding='utf-8-sig')
    (root / 'data.yaml').write_text('train: .\\images\nnames: [dog, cat]\n', encoding='utf-8-sig')
    return root


def as_yolo(root):
    (yolo(root) / 'classes.txt').write_text('dog\ncat\n')
    return root


def as_yolo_with_names_in_order(root):
    (yolo(root) / 'data.yaml').write_text('train: images\nnames: [dog, cat]\n')
    return root


@pytest.mark.parametrize('make', [
    as_voc, as_voc_with_other_names_and_png, as_xml_beside_images, as_coco_in_one_folder, as_coco_with_images_beside,
    as_yolo, as_yolo_with_names_in_order, as_coco_written_on_windows, as_yolo_written_on_windows])
def test_each_form_is_read_to_the_same_boxes(tmp_path, make):
    scan = read_boxes(make(tmp_path / 'data'))
    part, = scan.parts.values()
    assert not scan.bad and len(part) == len(BOXES) and set(part.classes) == {'cat', 'dog'}
    for path, boxes, labels in zip(part.paths, part.boxes, part.labels, strict=True):
        expected = BOXES[path.rpartition('/')[2].partition('.')[0]]
        assert [part.classes[i - 1] for i in labels.tolist()] == [label for label, _ in expected]
        torch.testing.assert_close(boxes, torch.tensor([box for _, box in expected]).float().reshape(-1, 4))
    assert any('1 photograph without a box' in line for line in scan.summary())
    assert any('4 boxes: ' in line and 'cat 2' in line and 'dog 2' in line for line in scan.summary())


def test_parts_that_are_given_are_taken(tmp_path):
    lists = {'train': 'ab', 'val': 'c', 'trainval': 'abc', 'test': 'd'}
    train, test, how = divide(read_boxes(voc(tmp_path / 'voc', lists=lists)))
    assert (len(train), len(test), how) == (3, 1, 'given: trainval; tested on test')

    for part in ('train', 'valid'):  # Roboflow's folders
        images(tmp_path / 'coco' / part)
        (tmp_path / 'coco' / part / '_annotations.coco.json').write_text(json.dumps(coco()))
        images(tmp_path / 'xml' / part)
        for name in BOXES:
            (tmp_path / 'xml' / part / f'{name}.xml').write_text(xml(name))
    (yolo(tmp_path / 'yolo', ('train', 'valid')) / 'data.yaml').write_text(
        'train: ../images/train\nval: ../images/valid\nnames:\n  0: dog\n  1: cat\n')
    for form in ('coco', 'xml', 'yolo'):
        scan = read_boxes(tmp_path / form)
        train, test, how = divide(scan)
        assert (len(train), len(test), how) == (4, 4, 'given: train; tested on val') and len(scan.twins) == 4


def test_a_split_is_drawn_by_seed_by_class_and_kept(tmp_path):
    scan = read_boxes(voc(tmp_path / 'data'))
    names = [f'{label}{i}' for label in ('a', 'b', 'd') for i in range(10)]
    root = tmp_path / 'more'
    images(root / 'images', names)
    (root / 'annotations').mkdir()
    for name in names:
        (root / 'annotations' / f'{name}.xml').write_text(xml(name[0], size=(WIDTH, HEIGHT)))
    scan = read_boxes(root)
    train, test, how = divide(scan, seed=1)
    assert (len(train), len(test), how) == (24, 6, '80-20 by seed 1') and not set(train.paths) & set(test.paths)
    assert {i for labels in test.labels for i in labels.tolist()} == {1, 2}
    assert divide(scan, seed=1)[1].paths == test.paths != divide(scan, seed=2)[1].paths
    (tmp_path / 'split.csv').write_text(write_box_split(train, test, root))
    again = read_box_split(tmp_path / 'split.csv', scan, root)
    assert [part.paths for part in again] == [train.paths, test.paths]
    (root / 'images' / f'{names[0]}.jpg').unlink()
    with pytest.raises(ValueError, match=f'{names[0]}.jpg: there is no such image any more'):
        read_box_split(tmp_path / 'split.csv', read_boxes(root), root)


def change(file, before, after):
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))


def damaged_coco(tmp_path, **changes):
    images(tmp_path)
    found = coco() | changes
    (tmp_path / 'x.json').write_text(json.dumps(found))
    return f'coco:{tmp_path / "x.json"}'


@pytest.mark.parametrize(('changes', 'message'), [
    ({'annotations': [{'id': 4, 'image_id': 99, 'category_id': 3, 'bbox': [0, 0, 1, 1]}]},
     'annotation 4 refers to image 99, which is not listed'),
    ({'annotations': [{'id': 4, 'image_id': 0, 'category_id': 5, 'bbox': [0, 0, 1, 1]}]},
     'annotation 4 refers to category 5; the categories are 0, 3, 7'),
    ({'images': 2 * [{'id': 0, 'file_name': 'a.jpg'}]}, 'the image id 0 occurs twice'),
    ({'images': [{'id': 0}]}, 'a field is missing'), ({'images': 3}, 'a field is missing or has the wrong type'),
    ({'annotations': []}, 'has 4 images, none with a usable box'),
])
def test_damaged_coco(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_boxes(damaged_coco(tmp_path, **changes))
    file = tmp_path / 'x.json'
    file.write_text(json.dumps(coco())[:-20])
    with pytest.raises(ValueError, match='x.json is not a COCO annotation file: Unterminated'):
        read_boxes(f'coco:{file}')


def test_bad_things_are_left_out_and_named(tmp_path):
    root = voc(tmp_path / 'voc')
    change(root / 'Annotations/a.xml', '<xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>25</ymax>',
           '<xmin>0.1</xmin><ymin>0.1</ymin><xmax>0.5</xmax><ymax>0.8</ymax>')
    change(root / 'Annotations/b.xml', '<width>40</width>', '<width>30</width>')
    (root / 'JPEGImages/d.jpg').unlink()
    scan = read_boxes(root)
    text = '\n'.join(scan.bad)
    assert 'box 0.1, 0.1, 0.5, 0.8 seems to be in fractions of the image; it must be in pixels' in text
    assert 'b.jpg is 40 x 30 pixels, but its annotation says 30 x 30' in text and 'd.jpg' in text
    assert len(scan.parts['all']) == 2 and sum(map(len, scan.parts['all'].boxes)) == 1
    with pytest.raises(ValueError, match='3 boxes or files of .* are bad'):
        read_boxes(root, 'fail')

    root = as_yolo(tmp_path / 'yolo')
    (root / 'labels/a.txt').write_text('2 0.5 0.5 0.1 0.1\n')
    (root / 'labels/b.txt').write_text('0 20 15 8 8\n1 0.5 0.5 0.2\n0 0.7 0.5 1e-8 0.4\n')
    text = '\n'.join(read_boxes(root).bad)
    assert 'a.txt, line 1: class 2 is not one of the 2 classes, 0 to 1' in text
    assert 'b.txt, line 1: box 20, 15, 8, 8 is not within the image; YOLO has centre' in text
    assert 'b.txt, line 2: expected 4 numbers after the class, or the points of an outline' in text
    assert 'b.txt, line 3: the box has no area' in text  # not in float32, and torchvision would stop the training


def test_what_is_no_data_set_with_boxes(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
        read_boxes(tmp_path / 'nowhere')
    images(tmp_path / 'only')
    with pytest.raises(ValueError, match='holds no annotations in a known format'):
        read_boxes(tmp_path / 'only')
    (tmp_path / 'only/data.yaml').write_text('train: x\n')
    with pytest.raises(ValueError, match='data.yaml is not a YOLO data.yaml.*must name its classes'):
        read_boxes(tmp_path / 'only')
    (tmp_path / 'only/data.yaml').write_text('train: x\nnames:\n')
    with pytest.raises(ValueError, match='data.yaml has None under "names"; it must name its classes there'):
        read_boxes(tmp_path / 'only')
    (tmp_path / 'only/data.yaml').write_text('train: x\nnames: [a]\n')
    with pytest.raises(ValueError, match='data.yaml names x under "train", which is neither a folder nor a list'):
        read_boxes(tmp_path / 'only')


def test_a_prefix_that_does_not_fit(tmp_path):
    (tmp_path / 'labels').mkdir()
    for name in ('labels/a.txt', 'a.xml'):
        (tmp_path / name).write_text('0 0.5 0.5 0.2 0.2')
    for source, message in (
            ('voc:{}/a.xml', 'a.xml is a file; give the folder'), ('coco:{}', 'holds no annotations.json'),
            ('yolo:{}/labels/a.txt', 'a.txt is a file'), ('yolo:{}', 'has 0 images, none with a usable')):
        with pytest.raises(ValueError, match=message):
            read_boxes(source.format(tmp_path))


def test_spawned_workers_get_many_photographs_by_few_descriptors(tmp_path):
    """A tensor in shared memory takes one each, and a process has a thousand of them."""
    dataset = read_boxes(as_yolo(tmp_path)).parts['all'].as_dataset(None, 32)
    pickle.loads(pickle.dumps(dataset))
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(dataset)  # as for a worker
    assert b'rebuild_tensor' not in buffer.getvalue()


def test_an_outline_of_yolo_is_boxed(tmp_path):
    root = as_yolo(tmp_path)
    (root / 'labels/a.txt').write_text('1 0.25 0.5 0.5 0.1 0.75 0.5 0.5 0.9\n')
    part = read_boxes(root).parts['all']
    torch.testing.assert_close(part.boxes[0], torch.tensor([[10., 3., 30., 27.]]))


def test_a_class_that_is_only_tested_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match="class 'cat' occurs in test images but in no training image"):
        divide(read_boxes(voc(tmp_path, lists={'train': 'b', 'test': 'd'})))


def parts_of(tmp_path, **lists):
    train, test, how = divide(read_boxes(voc(tmp_path, lists=lists)))
    return *(''.join(path.rpartition('/')[2][0] for path in part.paths) for part in (train, test)), how


def test_no_image_is_on_both_sides(tmp_path):
    assert parts_of(tmp_path / 'voc2012', train='ab', val='cd', trainval='abcd') == (
        'ab', 'cd', 'given: train; tested on val')
    assert parts_of(tmp_path / 'three', train='a', val='b', test='d') == (
        'ab', 'd', 'given: train and val; tested on test')
    assert parts_of(tmp_path / 'shared', train='abc', val='c')[:2] == ('ab', 'c')
    train, test, how = parts_of(tmp_path / 'one', train='abcd')
    assert sorted(train + test) == ['a', 'b', 'c', 'd'] and test and how == '80-20 by seed 0'


def test_copies_are_not_divided_between_training_and_testing(tmp_path):
    (tmp_path / 'annotations').mkdir()
    for i in range(40):  # every content twice
        name = f'{i:02}'
        images(tmp_path / 'images', [name])
        Image.new('RGB', (WIDTH, HEIGHT), (5 * (i // 2), 90, 10)).save(tmp_path / f'images/{name}.jpg')
        (tmp_path / f'annotations/{name}.xml').write_text(xml('a').replace('a.jpg', f'{name}.jpg'))
    scan = read_boxes(tmp_path)
    for seed in range(5):
        train, test, _ = divide(scan, seed=seed)
        contents = [{Image.open(path).getpixel((0, 0)) for path in part.paths} for part in (train, test)]
        assert (len(train), len(test)) == (32, 8) and not contents[0] & contents[1]


def test_the_rarest_class_by_images_decides_where_an_image_is_drawn(tmp_path):
    """One image with ten boxes of a class that no other has stays on the side that is trained on."""
    images(tmp_path / 'images', 'abcdef')
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'classes.txt').write_text('often\nonce\n')
    line = '{} 0.5 0.5 0.2 0.2\n'
    for name in 'abcdef':
        (tmp_path / 'labels' / f'{name}.txt').write_text(line.format(0) + (name == 'a') * 10 * line.format(1))
    for seed in range(6):
        divide(read_boxes(tmp_path), seed=seed)


def test_coco_as_other_tools_write_it(tmp_path):
    found = coco()
    found['images'] += [{'id': 9, 'file_name': 'a.jpg'}]  # listed twice, its boxes shared out
    found['annotations'][0]['image_id'] = 9
    found['annotations'] += [{'id': 50, 'image_id': 0, 'category_id': 3, 'bbox': [0, 0, 40, 30], 'iscrowd': 1},
                             {'id': 51, 'image_id': 2, 'category_id': 3, 'bbox': [-0.3, 0, 10, 30.2]}]
    found['categories'] += [{'id': 8, 'name': 'cat'}]
    images(tmp_path)
    (tmp_path / 'x.json').write_text(json.dumps(found))
    scan = read_boxes(f'coco:{tmp_path / "x.json"}')
    part = scan.parts['all']
    assert part.classes == ('dog', 'cat') and [len(b) for b in part.boxes] == [2, 1, 1, 1] and not scan.bad
    assert part.boxes[2].tolist() == [[0., 0., pytest.approx(9.7), 30.]]
    assert '1 crowd region (iscrowd): left out' in scan.summary()
    for row in found['annotations']:  # as CVAT marks masks drawn with the brush
        row['iscrowd'] = 1
    (tmp_path / 'x.json').write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r'none with a usable box: 6 crowd regions \(iscrowd\): left out'):
        read_boxes(f'coco:{tmp_path / "x.json"}')


def test_names_of_yolo_are_numbered_from_0(tmp_path):
    (yolo(tmp_path) / 'data.yaml').write_text('train: images\ntest: ../nowhere\nnames:\n  1: dog\n  2: cat\n')
    with pytest.raises(ValueError, match='numbers its classes 1, 2; they must be 0 to 1'):
        read_boxes(tmp_path)
    (tmp_path / 'data.yaml').write_text("train: images\ntest: ../nowhere\nnames:\n  '1': cat\n  '0': dog\n")
    assert read_boxes(tmp_path).parts['train'].classes == ('dog', 'cat')


def by_name(scan, part='all'):
    """Boxes by the last part of the file's name."""
    images = scan.parts[part]
    return {path.rpartition('/')[2]: boxes.tolist() for path, boxes in zip(images.paths, images.boxes, strict=True)}


AS_WRITTEN = {name: [list(map(float, box)) for _, box in objects] for name, objects in BOXES.items()}


def test_voc_files_of_another_name_than_their_images(tmp_path):
    root = voc(tmp_path)
    for i, name in enumerate(BOXES):
        (root / f'Annotations/{name}.xml').rename(root / f'Annotations/{i}.xml')
    scan = read_boxes(root)
    assert by_name(scan) == {f'{name}.jpg': boxes for name, boxes in AS_WRITTEN.items()} and not scan.bad
    assert len(scan.parts['all']) == len(BOXES)


def test_two_annotations_of_one_image(tmp_path):
    root = voc(tmp_path)
    (root / 'Annotations/e.xml').write_text(xml('b').replace('b.jpg', 'a.jpg'))
    scan = read_boxes(root)
    assert any('a.jpg has other boxes in' in reason and 'e.xml than in' in reason for reason in scan.bad)
    assert set(by_name(scan)) == {'b.jpg', 'c.jpg', 'd.jpg'}


def test_voc_in_sub_folders(tmp_path):
    for i, folder in enumerate(('x', 'y')):
        images(tmp_path / 'JPEGImages' / folder, ['1'])
        (tmp_path / 'Annotations' / folder).mkdir(parents=True)
        (tmp_path / 'Annotations' / folder / '1.xml').write_text(xml('ab'[i]).replace('ab'[i] + '.jpg', '1.jpg'))
    expected = {f'JPEGImages/{folder}/1.jpg': AS_WRITTEN[name] for folder, name in (('x', 'a'), ('y', 'b'))}
    for lists in ((), ('x/1', 'y/1')):
        if lists:
            (tmp_path / 'ImageSets/Main').mkdir(parents=True)
            (tmp_path / 'ImageSets/Main/train.txt').write_text('\n'.join(lists))
        part, = read_boxes(tmp_path).parts.values()
        found = {path.removeprefix(f'{tmp_path}/'): boxes.tolist()
                 for path, boxes in zip(part.paths, part.boxes, strict=True)}
        assert found == expected


def test_lists_with_spaces_and_repeated_lines(tmp_path):
    root = voc(tmp_path)
    (root / 'Annotations/a.xml').rename(root / 'Annotations/IMG 1.xml')
    (root / 'JPEGImages/a.jpg').rename(root / 'JPEGImages/IMG 1.jpg')
    for line in ('IMG 1', '"IMG 1"', 'IMG 1  1'):
        change_lists(root, all=[line, 'b', 'b', 'd'])
        scan = read_boxes(root)
        assert list(by_name(scan)) == ['IMG 1.jpg', 'b.jpg', 'd.jpg'] and not scan.bad, line
        assert len(scan.parts['all']) == 3


def change_lists(root, **lists):
    (root / 'ImageSets/Main').mkdir(parents=True, exist_ok=True)
    for part, names in lists.items():
        (root / f'ImageSets/Main/{part}.txt').write_text('\n'.join(names))


def test_an_annotation_is_of_the_image_of_its_own_name(tmp_path):
    """Files that were numbered anew keep the names that their tags have; images without a file are left out."""
    root = tmp_path / 'train'
    images(root, '0123')
    for i, name in enumerate('ab', start=1):
        (root / f'{i}.xml').write_text(xml(name).replace(f'{name}.jpg', f'{i - 1}.jpg'))
    scan = read_boxes(tmp_path)
    assert by_name(scan, 'train') == {
        '1.jpg': AS_WRITTEN['a'], '2.jpg': AS_WRITTEN['b']} and not scan.bad
    assert '2 photographs without an XML file: left out' in scan.summary()


def test_keypoints_are_no_outline(tmp_path):
    root = yolo(tmp_path)
    (root / 'data.yaml').write_text('train: images\nnames: [dog, cat]\nkpt_shape: [2, 2]\n')
    (root / 'labels/a.txt').write_text('0 0.5 0.5 0.2 0.2 0.45 0.45 0.55 0.55\n')
    scan = read_boxes(root)
    assert by_name(scan, 'train')['a.jpg'] == [[16., 12., 24., 18.]] and not scan.bad


def test_data_yaml_names_lists_and_what_is_not_there(tmp_path):
    root = yolo(tmp_path, ('train', 'val'))
    (root / 'train.txt').write_text('images/train/a.jpg\n./images/train/b.jpg\r\n\nimages/train/a.jpg\n')
    file = root / 'data.yaml'
    file.write_text('path: .\ntrain: train.txt\nval: [images/val, images/val]\nnames: [dog, cat]\n')
    scan = read_boxes(root)
    assert by_name(scan, 'train') == {'a.jpg': AS_WRITTEN['a'], 'b.jpg': AS_WRITTEN['b']}
    assert len(scan.parts['train']) == 2 and len(scan.parts['val']) == len(BOXES)
    for text, message in (('train: images/train\nval: valid', 'names valid under "val", which is neither a folder'),
                          ('train: [images/train, more]', 'names more under "train", which is neither a folder'),
                          ('val: images/val', 'names no training images')):
        file.write_text(f'{text}\nnames: [dog, cat]\n')
        with pytest.raises(ValueError, match=message):
            read_boxes(root)


def test_numbers_of_classes_and_bad_coordinates_of_yolo(tmp_path):
    root = as_yolo(tmp_path)
    (root / 'labels/a.txt').write_text('0.000000 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 x\n')
    (root / 'labels/b.txt').write_text('0.5 0.5 0.5 0.2 0.2\n')
    scan = read_boxes(root)
    assert by_name(scan)['a.jpg'] == [[16., 12., 24., 18.]] and 'b.jpg' not in by_name(scan)
    assert [reason.partition('labels/')[2] for reason in scan.bad] == [
        'a.txt, line 2: expected 4 numbers after the class, or the points of an outline',
        'b.txt, line 1: class 0.5 is not one of the 2 classes, 0 to 1']


def test_classes_that_have_no_names_are_called_by_their_numbers(tmp_path):
    root = yolo(tmp_path)
    (root / 'labels/a.txt').write_text('1200 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n')
    assert read_boxes(root).parts['all'].classes == ('0', '1', '7', '1200')


def test_labelimg_and_darknet_give_the_names_of_classes(tmp_path):
    assert 'called by their numbers' in ' '.join(read_boxes(yolo(tmp_path / 'yolo')).summary())
    (tmp_path / 'yolo/labels/classes.txt').write_text('dog\ncat\n')
    scan = read_boxes(tmp_path / 'yolo')
    assert scan.parts['all'].classes == ('dog', 'cat') and 'numbers' not in ' '.join(scan.summary())

    images(tmp_path / 'cvat/obj_Train_data')  # CVAT's "YOLO 1.1"
    for name in BOXES:
        (tmp_path / f'cvat/obj_Train_data/{name}.txt').write_text(yolo_lines(name))
    (tmp_path / 'cvat/obj.names').write_text('dog\ncat\n')
    scan = read_boxes(tmp_path / 'cvat')
    assert by_name(scan, 'train') == {f'{name}.jpg': boxes for name, boxes in AS_WRITTEN.items()} and not scan.bad


def test_subsets_as_cvat_writes_them(tmp_path):
    names = ('Train', 'Validation', 'Test')
    root = yolo(tmp_path / 'yolo', names)
    for name in names:
        (root / f'{name}.txt').write_text(''.join(f'data/images/{name}/{image}.jpg\n' for image in BOXES))
    (root / 'data.yaml').write_text('path: .\nnames: [dog, cat]\n' + ''.join(f'{n}: {n}.txt\n' for n in names))
    images(tmp_path / 'coco/images')
    (tmp_path / 'coco/annotations').mkdir()
    for name in names:
        (tmp_path / f'coco/annotations/instances_{name}.json').write_text(json.dumps(coco()))
    voc(tmp_path / 'voc', lists={name: BOXES for name in names})
    for name in names:  # XML files in a folder per part
        images(tmp_path / 'xml' / name)
        for image in BOXES:
            (tmp_path / 'xml' / name / f'{image}.xml').write_text(xml(image))
    for form in ('yolo', 'coco', 'voc', 'xml'):
        scan = read_boxes(tmp_path / form)
        assert {name: len(part) for name, part in scan.parts.items()} == {'train': 4, 'val': 4, 'test': 4}, form
        assert not scan.bad and by_name(scan, 'test') == {f'{n}.jpg': boxes for n, boxes in AS_WRITTEN.items()}

    root = yolo(tmp_path / 'years', ('train2017', 'val2017'))
    assert set(read_boxes(root).parts) == {'train', 'val'}
    for name in ('train2014', 'train2017'):
        (tmp_path / f'coco/annotations/instances_{name}.json').write_text(json.dumps(coco()))
    (tmp_path / 'coco/annotations/instances_Train.json').unlink()
    assert {'instances_train2014', 'instances_train2017'} < set(read_boxes(tmp_path / 'coco').parts)


def test_xml_files_in_any_folder_beside_their_images(tmp_path):
    for folder, name in (('batch1', 'a'), ('batch2', 'b')):
        images(tmp_path / folder, [name])
        (tmp_path / folder / f'{name}.xml').write_text(xml(name))
    assert by_name(read_boxes(tmp_path)) == {f'{name}.jpg': AS_WRITTEN[name] for name in 'ab'}


def test_another_xml_format_is_named(tmp_path):
    images(tmp_path / 'images')
    (tmp_path / 'annotations.xml').write_text('<annotations><image name="a.jpg"/></annotations>')
    with pytest.raises(ValueError, match='annotations.xml is not in Pascal VOC format; export the annotations as'):
        read_boxes(tmp_path)


def test_yolo_labels_beside_images_below_a_folder_called_images(tmp_path):
    root = tmp_path / 'images' / 'mine'
    images(root / 'train')
    for name in BOXES:
        (root / 'train' / f'{name}.txt').write_text(yolo_lines(name))
    (root / 'data.yaml').write_text('train: train\nnames: [dog, cat]\n')
    assert by_name(read_boxes(root), 'train') == {f'{name}.jpg': boxes for name, boxes in AS_WRITTEN.items()}


def test_a_confidence_or_track_after_a_box_of_yolo(tmp_path):
    root = as_yolo(tmp_path)
    (root / 'labels/a.txt').write_text('0 0.5 0.5 0.2 0.2 0.91\n')
    scan = read_boxes(root)
    assert by_name(scan)['a.jpg'] == [[16., 12., 24., 18.]] and not scan.bad


def test_hidden_copies_are_not_photographs(tmp_path):
    for make, folder in ((as_yolo, 'images'), (as_voc, 'JPEGImages')):
        root = make(tmp_path / folder)
        images(root / folder / '.ipynb_checkpoints', ['a-checkpoint'])
        images(root / folder, ['._b'])
        scan = read_boxes(root)
        assert len(scan.parts['all']) == len(BOXES) and not scan.bad and not scan.twins and not scan.notes


def test_a_few_photographs_leave_every_class_to_train_on(tmp_path):
    images(tmp_path / 'images', 'abcde')
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'classes.txt').write_text('cat\ndog\nbird\n')
    for name, label in zip('abcde', (0, 0, 1, 1, 2), strict=True):
        (tmp_path / f'labels/{name}.txt').write_text(f'{label} 0.5 0.5 0.2 0.2\n')
    for seed in range(4):
        assert len(divide(read_boxes(tmp_path), seed=seed)[1]) == 1


def test_a_part_that_repeats_the_training_images(tmp_path):
    (yolo(tmp_path) / 'data.yaml').write_text('train: images\nval: images\nnames: [dog, cat]\n')
    with pytest.raises(ValueError, match='all images of train are also in val, .*; to hold out a random fifth, leave'):
        divide(read_boxes(tmp_path))


def test_the_sizes_of_photographs_are_told_by_side(tmp_path):
    root = yolo(tmp_path)
    Image.new('RGB', (20, 90)).save(root / 'images/high.png')
    assert f'20 to {WIDTH} pixels wide, {HEIGHT} to 90 high' in read_boxes(root).summary()[0]


def test_a_split_is_found_again_however_the_data_is_named(tmp_path, monkeypatch):
    root = tmp_path / 'data'
    images(root / 'images')
    (root / 'annotations').mkdir()
    (root / 'annotations/instances_all.json').write_text(json.dumps(coco()))
    monkeypatch.chdir(tmp_path)
    named = 'coco:data/annotations/instances_all.json'
    assert data_folder(named).resolve() == root
    train, test, _ = divide(read_boxes(named))
    (tmp_path / 'split.csv').write_text(write_box_split(train, test, data_folder(named)))
    assert 'train,images/b.jpg' in (tmp_path / 'split.csv').read_text()
    named = f'coco:{root}/annotations/instances_all.json'
    again = read_box_split(tmp_path / 'split.csv', read_boxes(named), data_folder(named))
    assert [len(part) for part in again] == [len(train), len(test)]
