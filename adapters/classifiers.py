"""
Image classifiers by name: CIFAR's ResNets, Wide ResNets and VGGs with the layers' names of common
public repositories, and torchvision's. `models.classifier` is the one below; adapters/original.py
loads published weights into them. A classifier of your own needs no name here: see "Networks of
your own" in docs/reference.md.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import models as M


def shortcut(in_ch, out_ch, stride, pad=False):
    """Where the shape changes: a 1x1 convolution with BatchNorm, or if `pad` zeros for the new
    channels."""
    if in_ch == out_ch and stride == 1:
        return nn.Identity()
    if pad:
        extra = (out_ch - in_ch) // 2
        return nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, extra, extra)))
    conv = nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_ch))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016). skip: the shortcut's name, which
    differs between families."""

    def __init__(self, in_ch, out_ch, stride, skip, pad=False):
        super().__init__()
        self.skip = skip
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_ch)
        self.add_module(skip, shortcut(in_ch, out_ch, stride, pad))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + self.get_submodule(self.skip)(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 at a quarter of the width, and a shortcut."""

    def __init__(self, in_ch, out_ch, stride, skip, pad=False):
        super().__init__()
        self.skip = skip
        mid = out_ch // 4
        self.conv1 = nn.Conv2d(in_ch, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out_ch, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_ch)
        self.add_module(skip, shortcut(in_ch, out_ch, stride, pad))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + self.get_submodule(self.skip)(x))


class WideBlock(nn.Module):
    """BN-ReLU-conv twice; where the width changes, the shortcut starts after the first BN-ReLU."""

    def __init__(self, in_ch, out_ch, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, 1, 1, bias=False)
        if in_ch != out_ch:
            self.convShortcut = nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)

    def forward(self, x):
        h = F.relu(self.bn1(x))
        skip = self.convShortcut(h) if hasattr(self, 'convShortcut') else x
        return skip + self.conv2(F.relu(self.bn2(self.conv1(h))))


def stages(name, block, counts, in_ch, widths, *more):
    """{name1: blocks, name2: blocks, ...}; every stage after the first halves the resolution."""
    found = {}
    for i, (count, out_ch) in enumerate(zip(counts, widths), 1):
        blocks = []
        for j in range(count):
            stride = 2 if j == 0 and i > 1 else 1
            blocks.append(block(in_ch, out_ch, stride, *more))
            in_ch = out_ch
        found[f'{name}{i}'] = nn.Sequential(*blocks)
    return found


class Classifier(nn.Module):
    """Named layers applied in sequence; those in `ends` end a stage. The last layer is linear and
    takes the spatial mean of the last map."""

    def __init__(self, layers, ends):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.ends = ends
        self.head_name = name

    def forward_features(self, x):
        """(logits (B, num_classes), [the last map (B, C, h, w) of each stage])."""
        maps = []
        *layers, (_, head) = self.named_children()
        for name, layer in layers:
            x = layer(x)
            if name in self.ends:
                maps.append(x)
        return head(x.mean((2, 3))), maps

    def forward(self, x):
        return self.forward_features(x)[0]


def resnet(depth, num_classes=10, in_channels=3, width=None, shortcut='conv', max_pool=False):
    """CIFAR ResNets: depth 6n+2 has three stages (He et al. 2016); 18, 34 and 50 are ImageNet's
    with a 3x3 stem, followed by ImageNet's max pool if `max_pool`."""
    deep = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
    if depth in deep:
        counts = deep[depth]
        width = width or 64
        skip, head = 'shortcut', 'linear'
    else:
        counts = [(depth - 2) // 6] * 3
        width = width or 16
        skip, head = 'downsample', 'fc'
    block, expansion = (Bottleneck, 4) if depth == 50 else (BasicBlock, 1)
    widths = [width * 2**i * expansion for i in range(len(counts))]
    layers = {
        'conv1': nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), 'bn1': nn.BatchNorm2d(width),
        'relu': nn.ReLU()
    }
    if max_pool:
        layers['maxpool'] = nn.MaxPool2d(3, 2, 1)
    maps = stages('layer', block, counts, width, widths, skip, shortcut == 'pad')
    return Classifier(layers | maps | {head: nn.Linear(widths[-1], num_classes)}, [*maps])


def wide_resnet(depth, widen, num_classes=10, in_channels=3):
    """Wide ResNet (Zagoruyko & Komodakis 2016), depth 6n+4."""
    widths = [16 * widen, 32 * widen, 64 * widen]
    layers = {'conv1': nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)}
    for name, blocks in stages('block', WideBlock, [(depth - 4) // 6] * 3, 16, widths).items():
        layers[name] = nn.Sequential()
        layers[name].add_module('layer', blocks)
    layers['bn1'] = nn.BatchNorm2d(widths[-1])
    layers['relu'] = nn.ReLU()
    layers['fc'] = nn.Linear(widths[-1], num_classes)
    return Classifier(layers, ('block1', 'block2', 'relu'))


class PoolLarge(nn.MaxPool2d):
    """The fourth pooling of a VGG. It acts only on maps of at least 8x8, so that images of 32 and
    of 64 pixels both end at 4x4."""

    def forward(self, x):
        return super().forward(x) if x.shape[-1] >= 8 else x


def vgg(depth, num_classes=10, in_channels=3):
    """VGG with BatchNorm and one linear layer (Simonyan & Zisserman 2015), as used on CIFAR."""
    counts = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
    layers = {}
    ch = in_channels
    for i, (count, out_ch) in enumerate(zip(counts[depth], (64, 128, 256, 512, 512))):
        block = []
        for _ in range(count):
            block += [nn.Conv2d(ch, out_ch, 3, padding=1), nn.BatchNorm2d(out_ch), nn.ReLU()]
            ch = out_ch
        layers[f'block{i}'] = nn.Sequential(*block)
        if i < 3:
            layers[f'pool{i}'] = nn.MaxPool2d(2)
        elif i == 3:
            layers[f'pool{i}'] = PoolLarge(2)
    layers['classifier'] = nn.Linear(ch, num_classes)
    return Classifier(layers, [f'block{i}' for i in range(5)])


def hooked_features(net, layers, x):
    """(logits, outputs of `layers`) of one forward pass; of a layer called twice, the last."""
    outputs = {}

    def keep(layer, args, output):
        outputs[layer] = output

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        logits = net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, [outputs[layer] for layer in layers if layer in outputs]


class Torchvision(nn.Module):
    """A torchvision classifier; its maps are the last map of each resolution, at most four."""

    def __init__(self, name, num_classes=1000, in_channels=3, weights=None):
        super().__init__()
        import torchvision

        if in_channels != 3:
            raise ValueError('torchvision classifiers take colour images only')
        self.net = torchvision.models.get_model(name, weights=weights, num_classes=num_classes)
        linear = [k for k, m in self.net.named_modules() if isinstance(m, nn.Linear)]
        self.head_name = 'net.' + linear[-1]

    def forward_features(self, x):
        layers = list(getattr(self.net, 'features', self.net).children())
        logits, outputs = hooked_features(self.net, layers, x)
        maps = {out.shape[2:]: out for out in outputs if out.dim() == 4 and out.shape[-1] > 1}
        return logits, list(maps.values())[-4:]

    def forward(self, x):
        return self.net(x)


def build(name, num_classes, kw):
    """The network of a name, without its attributes. Raises UserError for an unknown one."""
    family, _, sizes = name.partition(':')
    if family != 'torchvision':
        family = name.rstrip('0123456789_')
        sizes = name[len(family) :]
    depth, _, widen = sizes.partition('_')
    depth = int(depth) if depth.isdecimal() else 0
    if family == 'torchvision':
        return Torchvision(sizes, num_classes, **kw)
    if family == 'resnet' and (depth in (18, 34, 50) or depth >= 8 and depth % 6 == 2):
        return resnet(depth, num_classes, **kw)
    if family == 'wrn' and depth >= 10 and depth % 6 == 4 and widen.isdecimal():
        return wide_resnet(depth, int(widen), num_classes, **kw)
    if family == 'vgg' and depth in (11, 13, 16, 19):
        return vgg(depth, num_classes, **kw)
    raise M.UserError(
        f'no classifier {name!r}: resnet8, 14, 20 ... 110, resnet18, 34 or 50, wrn16_1 ... '
        'wrn40_2, vgg11, 13, 16 or 19, torchvision:resnet34 and its like, or a Python file '
        'with build()'
    )


def classifier(name, num_classes=10, image_size=32, mean=(0.5,), std=(0.5,), **kw):
    """An image classifier by its name: resnet8 ... resnet110 (6n+2), resnet18/34/50, wrn16_1 ...
    wrn40_2, vgg11/13/16/19 or torchvision:NAME.

    `forward(x)` gives logits (B, num_classes), `forward_features(x)` also the last map of every
    stage. `image_size`, `mean` and `std` (of images in [0, 1]) are used by `preprocess`. kw:
    in_channels; width, shortcut ('conv' or 'pad') and max_pool of the ResNets. Raises UserError for
    an unknown name.
    """
    net = build(name, num_classes, kw)
    for key, values in (('mean', mean), ('std', std)):
        if len(values) not in (1, kw.get('in_channels', 3)):
            raise M.UserError(f'{key}={values} must be one number, or one per channel')
    net.config = {
        'class': 'classifier', 'name': name, 'num_classes': num_classes, 'image_size': image_size,
        'mean': mean, 'std': std
    } | kw
    net.num_classes = num_classes
    net.image_size = image_size
    net.in_channels = kw.get('in_channels', 3)
    net.mean = mean
    net.std = std
    return net


def complete(net, spec):
    """Adds the attributes that a user's classifier lacks: in_channels 3, image_size 0 (any size),
    num_classes the number of its logits. Raises UserError if it does not give logits of at least
    two classes."""
    if not hasattr(net, 'in_channels'):
        net.in_channels = 3
    if not hasattr(net, 'image_size'):
        net.image_size = 0
    side = net.image_size or 32
    noise = torch.randn(4, net.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = net.eval()(noise)
    M.check(
        out.shape[1] > 1,
        f'{spec} has one output, whose softmax is always 1: as logits of two classes, return '
        'torch.cat([0 * out, out], 1)'
    )
    M.check(
        out.min() < 0 or not torch.allclose(out.sum(1), torch.ones(4), atol=1e-3),
        f'{spec} returns probabilities, which are positive and sum to 1: return the logits, before '
        'its softmax'
    )
    if not hasattr(net, 'num_classes'):
        net.num_classes = out.shape[1]
    return net
