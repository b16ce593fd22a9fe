"""
The ladder VAE of the slides (Sonderby et al. 2016), under the layers' names of its original code.
`models.LVAE` makes one; distill_vae.py trains and distils it. Nothing here needs models.py but the
record of the arguments and the KL, so the file can be copied alone.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import models as M


class LadderBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut. `resample`: 'same'; 'downsample' by 2;
    'upsample' to `side`. Where it resamples, the shortcut, whose name this is, is a 1x1
    convolution."""

    def __init__(self, in_ch, width, resample='same', side=None):
        super().__init__()
        self.resample = resample
        self.side = side
        stride = 2 if resample == 'downsample' else 1
        if resample != 'same':
            self.add_module(resample, nn.Conv2d(in_ch, width, 1, stride, bias=False))
        self.conv1 = nn.Conv2d(in_ch, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        if self.resample == 'upsample':
            x = F.interpolate(x, size=(self.side, self.side))
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        skip = x if self.resample == 'same' else self.get_submodule(self.resample)(x)
        return F.relu(h + skip)


class LadderLevel(nn.Module):
    """Two residual blocks, the first of which may resample, and a 1x1 convolution to a Gaussian."""

    def __init__(self, in_ch, width, out_ch, resample='same', side=None):
        super().__init__()
        first = LadderBlock(in_ch, width, resample, side)
        self.net = nn.Sequential(first, LadderBlock(width, width))
        self.out = nn.Conv2d(width, out_ch, 1, bias=False)


def gaussian(out):
    """Splits 2C channels into (mean, std); an output of zeros gives the standard normal. 0.6931 is
    ln 2 as the original code rounds it."""
    mean, s = out.float().chunk(2, dim=1)
    return mean, F.softplus(s) / 0.6931 + 1e-6


class LVAE(nn.Module):
    """Ladder VAE (Sonderby et al. 2016) with 16-channel latents at every halving of the image.

    The levels have 16, 8, 4, 2, 1 pixels a side for images of 32, and 14, 7, 4, 2, 1 for 28. Width
    128 at 32 pixels is the slides' teacher, 8 their student. Images (B, C, H, W) are in [0, 1]
    here. Lists over levels start at the finest; noise is a list of (B, 16, h, w). A decoder's
    output has 2C channels, of which the first C are the mean of the pixels; their std is sqrt(beta
    / 2).
    """

    castable = True  # its weights may be cast once, see cast_frozen

    def __init__(self, image_size=32, in_channels=3, width=128):
        super().__init__()
        self.config = M.arguments(locals()) | {'class': 'LVAE'}
        self.image_size = image_size
        self.in_channels = in_channels
        self.sides = [image_size]
        while self.sides[-1] > 1:
            self.sides.append(-(-self.sides[-1] // 2))
        self.levels = len(self.sides) - 1
        stem = nn.Conv2d(in_channels, width, 5, stride=2, padding=2)
        self.u1 = nn.Sequential(stem, LadderLevel(width, width, 32))
        for i in range(2, self.levels + 1):
            self.add_module(f'u{i}', LadderLevel(width, width, 32, 'downsample'))
        for i in reversed(range(self.levels)):
            out_ch = 32 if i else 2 * in_channels
            self.add_module(f'd{i}', LadderLevel(16, width, out_ch, 'upsample', self.sides[i]))

    def noise(self, n, generator=None):
        """Standard normal noise for n images: a list of (n, 16, h, w), finest level first."""
        device = self.d0.out.weight.device
        return [
            torch.randn(n, 16, side, side, generator=generator, device=device)
            for side in self.sides[1:]
        ]

    def encode(self, x):
        """The Gaussian (mean, std) of each level from the image alone, finest level first. Raises
        ValueError for images that are not in [0, 1]."""
        if x.is_cpu and (x.min() < 0 or x.max() > 1):  # not on a GPU: the check would synchronise
            raise ValueError(f'images in [{x.min():.2f}, {x.max():.2f}]: a VAE takes [0, 1]')
        h = self.u1[0](x)
        found = []
        for i in range(1, self.levels + 1):
            level = self.u1[1] if i == 1 else self.get_submodule(f'u{i}')
            h = level.net(h)
            found.append(gaussian(level.out(h)))
        return found

    def decode(self, noise, seen=None):
        """(out, q, p) of the top-down pass, with z = mean + std * noise at every level.

        p: the prior Gaussians, each given the z of the level above; q: the Gaussians that z is
        drawn from. Without `seen` the two are equal. With `seen`, the output of `encode`, q is the
        normalised product of `seen` and p; at the top level q is `seen` alone.
        """
        p = [None] * self.levels
        q = [None] * self.levels
        p[-1] = torch.zeros_like(noise[-1]), torch.ones_like(noise[-1])
        q[-1] = seen[-1] if seen else p[-1]
        z = q[-1][0] + q[-1][1] * noise[-1]
        for i in reversed(range(self.levels - 1)):
            level = self.get_submodule(f'd{i + 1}')
            p[i] = gaussian(level.out(level.net(z)))
            q[i] = combine(seen[i], p[i]) if seen else p[i]
            z = q[i][0] + q[i][1] * noise[i]
        return self.d0.out(self.d0.net(z)).float(), q, p

    def forward(self, x, noise):
        """(out, q, p): the reconstruction of x in [0, 1], the posterior and the prior Gaussians."""
        return self.decode(noise, self.encode(x))

    def elbo(self, x, noise, beta=0.1):
        """(nll (B,), [KL of each level (B,)]) of images in [0, 1]; their sum is the negative ELBO
        in nats, for pixels of variance beta / 2."""
        out, q, p = self(x, noise)
        mean = out[:, : x.shape[1]]
        nll = 0.5 * ((mean - x) ** 2 * 2 / beta + math.log(math.pi * beta))
        return nll.sum((1, 2, 3)), [M.gaussian_kl(a, b) for a, b in zip(q, p)]


def combine(a, b):
    """The product of two Gaussians (mean, std), each weighted by its precision."""
    precision_a = a[1] ** -2
    precision_b = b[1] ** -2
    var = 1 / (precision_a + precision_b)
    return var * (precision_a * a[0] + precision_b * b[0]), var.sqrt()
