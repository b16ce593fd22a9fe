"""
Sets of image files: a folder with a subfolder per class, or with none; a list of files and labels
(DomainNet's); EDM's dataset.json; Tiny-ImageNet's `val`; and the data sets of torchvision. The
scripts call this file for every set of images that is not in a format of ours:

    python distill_classifier.py --data=folder      # short for --data=adapters/images.py:folder

A set that is larger than the memory is written to a file first, which the scripts then map instead
of reading it. What was done is kept when this is stopped; the same command goes on.

    python adapters/images.py FOLDER --image_size=64 --out=set.npy
    python distill_classifier.py --data=set.npy
"""
import os

image_size = 64              # side of the images: the central square of each is resized to it
channels = 3                 # 1 (grey) or 3
out = 'set.npy'              # uint8 images, N x H x W x C; the labels go beside it, set.labels.npy
if __name__ == '__main__':
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    source = ''              # the set of images, the first argument
    if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
        source = sys.argv.pop(1)
    exec(open(os.path.join(sys.path[0], 'configurator.py')).read())

import glob
import inspect
import json
import re
import zipfile
import zlib

import numpy as np
import torch
from tqdm import tqdm

import models as M

SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'test')  # not names of classes


# ==== the strings that name a set of images
def split_classes(spec):
    """Splits 'mnist:0-4' into ('mnist', [0, 1, 2, 3, 4]) and 'list.txt:7,3' into ('list.txt', [7,
    3]); without such an ending, or if `spec` is an existing path, (spec, None)."""
    match = re.fullmatch(r'(.+):(?:(\d+)-(\d+)|(\d+(?:,\d+)*))', spec)
    if os.path.exists(spec) or not match:
        return spec, None
    path, low, high, numbers = match.groups()
    if numbers:
        return path, [int(number) for number in numbers.split(',')]
    M.check(int(low) <= int(high), f'{spec}: in NAME:a-b, a must not be greater than b')
    return path, list(range(int(low), int(high) + 1))


def shards_of(spec):
    """The .npz files that a string for `load_images` names."""
    path, _ = split_classes(spec)
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), '**', '*.npz'), recursive=True))
    return [path] if path.endswith('.npz') else []


def load_images(spec, train=True, image_size=0, channels=0):
    """See models.load_images."""
    path, classes = split_classes(spec)
    if M.split_file(path)[0]:
        (images, labels), _ = M.load_from_file(
            'images', path, {}, train=train, image_size=image_size, classes=classes
        )
    else:
        images, labels = load(path, train, image_size, classes)
    if classes:
        M.check(labels is not None, f'{spec} has no labels to choose classes by')
        chosen = torch.isin(labels, torch.tensor(classes))
        M.check(chosen.any(), f'{spec} has no images of these classes')
        images, labels = images[chosen], labels[chosen]
        if ',' in spec.removeprefix(path):
            labels = torch.tensor([classes.index(label) for label in labels.tolist()])
    return converted(spec, images, image_size, channels), labels


def load(spec, train=True, image_size=0, classes=None):
    """(images uint8 (N, C, H, W), labels int64 (N,) or None) from one string, see
    models.load_images. classes: image files with other labels are not read; None for all. Raises
    UserError if there are none, if they differ in size, or if their range of values is not known.
    """
    if spec.endswith('.npy'):
        return map_images(spec)
    shards = shards_of(spec)
    if not shards:
        return read_files(spec, train, image_size, classes)
    parts = [load_npz(f) for f in shards]
    if len({p[0].shape[1:] for p in parts}) > 1 or len({p[1] is None for p in parts}) > 1:
        raise M.UserError(f'{spec}: its shards differ in image size, channels or labels')
    labels = None if parts[0][1] is None else torch.cat([p[1] for p in parts])
    return torch.cat([p[0] for p in parts]), labels


def converted(spec, images, image_size, channels):
    """Images resized to `image_size` (0: as they are), with so many channels (0: as they are).
    Raises UserError if there are none, or if they are not square."""
    M.check(len(images), f'{spec} has no images')
    if image_size and images.shape[2:] != (image_size, image_size):
        M.check(
            not spec.endswith('.npy'),
            f'{spec} has images of {images.shape[2]} pixels, not {image_size}: write it anew with '
            'adapters/images.py --image_size'
        )
        images = torch.cat([resize_images(part, image_size) for part in images.split(500)])
    height, width = images.shape[2:]
    M.check(
        height == width,
        f'{spec}: images must be square, they are {height}x{width}; an image_size takes the centre'
    )
    if channels == 1 and images.shape[1] == 3:
        print(f'{spec}: colour images are converted to grey')
    return M.with_channels(images, channels)


# ==== sets of images in our own formats
def labels_of(path):
    """The file with the labels of a mapped set of images, NAME.labels.npy of NAME.npy."""
    return path.removesuffix('.npy') + '.labels.npy'


def map_images(path):
    """(images uint8 (N, C, H, W), labels or None) of an .npy, uint8 NHWC, which may be larger than
    the memory: an image is read when it is indexed."""
    try:  # a private copy: read only
        images = np.load(M.existing(path), mmap_mode='c', allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise M.UserError(f'{path} is not an array of images, or it is incomplete') from e
    images = channels_last(images, path)
    labels = None
    if os.path.exists(labels_of(path)):
        labels = torch.from_numpy(np.load(labels_of(path), allow_pickle=False))
        M.check(len(labels) == len(images), f'{labels_of(path)} must be {len(images)} labels')
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels


def channels_last(images, path):
    """uint8 images (N, H, W, C) of a file; N x C x H x W is transposed, and a line says so. Raises
    UserError for any other array."""
    shape = images.shape
    known = images.ndim == 4 and (shape[3] in (1, 3) or shape[1] in (1, 3))
    M.check(
        images.dtype == np.uint8 and known,
        f'{path}: images must be uint8, N x H x W x C; they are {images.dtype}, {shape}'
    )
    if shape[3] in (1, 3):
        return images
    if M.rank_and_world()[0] == 0:
        print(f'{path}: its images are N x C x H x W, {shape}')
    return images.transpose(0, 2, 3, 1)


def load_npz(path):
    """(images uint8 (N, C, H, W), labels int64 (N,) or None) of an ADM-style .npz."""
    with M.open_npz(path) as z:
        M.check('arr_0' in z, f"{path} has no images, 'arr_0', but {', '.join(z) or 'nothing'}")
        try:
            images, labels = z['arr_0'], z.get('arr_1')
        except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as e:
            raise M.UserError(f'{path} is incomplete, or holds Python objects: {e}') from e
    images = channels_last(images, path)
    if labels is not None:
        if (
            labels.shape != images.shape[:1]
            or labels.dtype.kind not in 'iu'
            or labels.min(initial=0) < 0
        ):
            raise M.UserError(
                f"{path}: 'arr_1' must be {len(images)} labels from 0, not {labels.dtype}"
            )
        labels = torch.from_numpy(labels.astype(np.int64))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def resize_images(images, size):
    """uint8 images (N, C, H, W): the central square, resized to `size`; unchanged if size
    is 0."""
    H, W = images.shape[2:]
    if size == 0 or size == H == W:
        return images
    side = min(H, W)
    top, left = (H - side) // 2, (W - side) // 2
    square = images[:, :, top : top + side, left : left + side]
    return M.to_uint8(M.resize(M.to_float(square), size))


# ==== image files
def read_files(spec, train, image_size, classes):
    """The images and labels of a folder, a list, or a data set of torchvision."""
    images = []
    labels = []
    for read, label in image_readers(spec, train):
        if classes is None or label is None or label in classes:
            images.append(resize_images(read()[None], image_size))
            labels.append(label)
    if not images:
        raise M.UserError(f'no images in {spec}')
    if len({image.shape[2:] for image in images}) > 1:
        raise M.UserError(
            f'{spec}: its images differ in size ({tuple(images[0].shape[2:])} and others); set '
            '--image_size, or resize them first if the script has no such key'
        )
    most = max(image.shape[1] for image in images)  # grey only if all images are grey
    images = torch.cat([image.expand(-1, most, -1, -1) for image in images])
    return images, torch.tensor(labels) if isinstance(labels[0], int) else None


def image_readers(spec, train=True):
    """[(read, label or None)] of a set of images: read() gives one as uint8 (C, H, W)."""
    if os.path.isdir(spec) or spec.endswith('.txt'):
        return [(FileReader(file), label) for file, label in image_files(spec)]
    dataset = torchvision_dataset(spec)
    if dataset is None:
        raise M.UserError(
            f'no images at {spec!r}: an .npz, an .npy, a folder, or a torchvision dataset such as '
            'mnist or cifar10'
        )
    split = {'split': 'train' if train else 'test'}
    if 'train' in inspect.signature(dataset).parameters:
        split = {'train': train}
    with M.local_rank_0_first():
        pairs = dataset('data', download=True, **split)
    return PairReader(pairs, spec)


class FileReader:
    """Reads one image file when it is called."""

    def __init__(self, file):
        self.file = file

    def __call__(self):
        from PIL import Image

        try:
            with Image.open(self.file) as image:
                return to_tensor(image, self.file)
        except OSError as e:
            raise M.UserError(f'{self.file} cannot be read as an image: {e}') from e


class PairReader:
    """A data set of torchvision as pairs (read, label)."""

    def __init__(self, pairs, name):
        self.pairs = pairs
        self.name = name

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, label = self.pairs[i]
        return lambda: to_tensor(image, self.name), label


def torchvision_dataset(name):
    """The class of a torchvision dataset (mnist, cifar10, ...), None for other names."""
    from torchvision import datasets

    names = {n.lower(): n for n in datasets.__all__}
    return getattr(datasets, names[name.lower()]) if name.lower() in names else None


def sorted_names(names):
    """Names in order; numbers in the order of their values, as 0, 1, 2, 10."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def subfolders(folder):
    """The names of the folders in a folder, links to folders among them, in order. Hidden ones are
    skipped."""
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith(('.', '__MACOSX')):
            found.append(entry.name)
    return sorted_names(found)


def own_files(folder):
    """The image files in a folder, in order. Hidden ones are skipped."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = []
    for entry in os.scandir(folder):
        known = entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith('.')
        if known and entry.is_file():
            found.append(os.path.join(folder, entry.name))
    return sorted(found)


def files_below(folder):
    """The image files in a folder and in its subfolders, in order."""
    found = own_files(folder)
    for name in subfolders(folder):
        found += files_below(os.path.join(folder, name))
    return found


def class_names(spec):
    """The names of the class folders of a folder of images; [] for all else."""
    path, _ = split_classes(spec)
    lists = ('val_annotations.txt', 'dataset.json')
    if shards_of(spec) or not os.path.isdir(path):
        return []
    if any(os.path.exists(os.path.join(path, f)) for f in lists):
        return []
    return subfolders(path)


def image_files(spec):
    """[(file, label or None)] of a .txt of lines `file label`, or of a folder. Class folders are
    numbered in order, empty ones too. Raises UserError for a folder whose classes are unclear."""
    if spec.endswith('.txt'):
        rows = [line.rsplit(' ', 1) for line in M.read_lines(spec)]
        if any(len(row) < 2 or not row[1].isdecimal() for row in rows):
            raise M.UserError(f'{spec}: every line must be a file and a label')
        return [(os.path.join(os.path.dirname(spec), file), int(label)) for file, label in rows]
    notes = os.path.join(spec, 'val_annotations.txt')
    # Tiny-ImageNet's: file, class and box; classes are numbered as the folders of `train`
    if os.path.exists(notes):
        rows = [line.split('\t') for line in M.read_lines(notes)]
        names = sorted({row[1] for row in rows})
        return [(os.path.join(spec, 'images', row[0]), names.index(row[1])) for row in rows]
    notes = os.path.join(spec, 'dataset.json')  # EDM's and StyleGAN's
    if os.path.exists(notes):
        with open(notes, encoding='utf-8') as f:
            rows = json.load(f).get('labels')
        if rows:
            return [(os.path.join(spec, file), int(label)) for file, label in rows]
    names = subfolders(spec)
    files = {name: files_below(os.path.join(spec, name)) for name in names}
    alone = own_files(spec)
    full = [name for name in names if files[name]]
    if alone and full:
        raise M.UserError(
            f'{spec} holds both images ({len(alone)}) and folders of images ({full[0]}, ...): '
            'keep one kind only'
        )
    if len(full) > 1 and all(name.lower() in SPLITS for name in full):
        raise M.UserError(f"{spec} holds {', '.join(full)}: name one of them, {spec}/{full[0]}")
    if os.path.exists(notes) or not full:
        return [(file, None) for file in alone or sum(files.values(), [])]
    if len(full) < len(names):
        empty = ', '.join(name for name in names if not files[name])
        print(f'{spec}: no images in {empty}; as a class it keeps its number')
    pairs = []
    for label, name in enumerate(names):
        pairs += [(file, label) for file in files[name]]
    return pairs


def to_tensor(image, name):
    """A PIL image as uint8 (C, H, W), C 1 or 3: rotated by its EXIF tag, transparency on white,
    16-bit grey divided by 65,535, floats taken to be in [0, 1], CMYK and palettes as RGB, palettes
    of greys as grey. Raises UserError for other modes, whose range of values is not known."""
    from PIL import Image, ImageOps

    mode, kind = image.mode, image.format
    if getattr(image, 'n_frames', 1) > 1:
        raise M.UserError(f'{name} holds {image.n_frames} images: one file per image is wanted')
    image = ImageOps.exif_transpose(image)
    if mode.startswith('I;16') or mode == 'I' and kind in ('PNG', 'PPM') or mode == 'F':
        values = np.asarray(image).astype(np.float64) / (1 if mode == 'F' else 65535)
        if not (values.min() >= 0 and values.max() <= 1):  # also false for nan
            raise M.UserError(f'{name}: its values are floats outside [0, 1]')
        return torch.from_numpy((values * 255).round().astype(np.uint8))[None]
    grey = mode in ('1', 'L', 'LA', 'La')
    if mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        white = Image.new('RGBA', image.size, 'white')
        white.alpha_composite(image.convert('RGBA'))
        image = white
    elif mode not in ('1', 'L', 'P', 'RGB', 'CMYK', 'YCbCr', 'LAB', 'HSV'):
        raise M.UserError(
            f'{name}: the range of mode {mode!r} ({kind}) is not known; 8 or 16 bit, or float in '
            '[0, 1]'
        )
    values = np.asarray(image.convert('L' if grey else 'RGB'))
    if mode == 'P' and (values == values[:, :, :1]).all():  # a palette of greys
        values = values[:, :, 0]
    return torch.from_numpy(values.copy()).view(*values.shape[:2], -1).permute(2, 0, 1)


# ==== a set that is larger than the memory
def write_map(spec, image_size, channels, out):
    """Writes a set of images as one file that the scripts map: `out`, uint8 (N, H, W, C), and its
    labels. A note beside the unfinished file counts what is done, so that a run that was stopped
    goes on."""
    pairs = image_readers(spec)
    shape = [len(pairs), image_size, image_size, channels]
    unfinished = out + '.part'
    note = out + '.part.json'
    done = 0
    if os.path.exists(note) and os.path.exists(unfinished):
        with open(note) as f:
            before = json.load(f)
        if before['set'] != [os.path.abspath(spec), *shape]:
            raise M.UserError(f'{unfinished} was begun with another set or size: remove it')
        done = before['done']
    mode = 'r+' if done else 'w+'
    images = np.lib.format.open_memmap(unfinished, mode, np.uint8, None if done else tuple(shape))
    labels = []
    for i, (read, label) in enumerate(tqdm(pairs, 'images')):
        labels.append(-1 if label is None else label)
        if i < done:
            continue
        image = M.with_channels(resize_images(read()[None], image_size), channels)
        images[i] = image[0].permute(1, 2, 0).numpy()
        if (i + 1) % 1000 == 0:
            images.flush()
            count = {'set': [os.path.abspath(spec), *shape], 'done': i + 1}
            M.write_atomically(note, lambda tmp: write_json(tmp, count))
    images.flush()
    del images
    if labels and labels[0] >= 0:
        M.write_atomically(labels_of(out), lambda tmp: write_labels(tmp, labels))
    os.replace(unfinished, out)
    if os.path.exists(note):
        os.remove(note)
    print(f'{out}: {len(labels):,} images of {image_size}x{image_size}x{channels}')


def write_json(path, value):
    with open(path, 'w') as f:
        json.dump(value, f)


def write_labels(path, labels):
    with open(path, 'wb') as f:
        np.save(f, np.array(labels, dtype=np.int64))


if __name__ == '__main__':
    if not source:
        raise M.UserError('name a set of images: python adapters/images.py FOLDER --out=set.npy')
    if channels not in (1, 3) or image_size < 1 or not out.endswith('.npy'):
        raise M.UserError('channels must be 1 or 3, image_size above 0, and out a file NAME.npy')
    write_map(source, image_size, channels, out)
