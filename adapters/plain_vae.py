"""
A plain VAE (Kingma & Welling 2014) with the sizes of the teacher in the slides' repository: three
strided convolutions of 64, 128 and 256 channels, 128 latents, a mirrored decoder and a sigmoid. It
is also the example of a VAE of your own: `noise`, `encode`, `decode` and `elbo` are all that
distill_vae.py and synthesize.py call.

    P=adapters/plain_vae.py
    # a teacher, from data
    python distill_vae.py --method=data --data=mnist --student=$P --student_config.width=64 \\
        --lr=1e-3 --grad_clip=10.0 --kl_warmup=1000 --out_dir=out/plain
    # a student of width 8, from noise; at the default rate, made for models.LVAE, all images
    # become the same
    python distill_vae.py --teacher=$P:out/plain/student.safetensors --student=$P --lr=1e-3
    # and with its encoder, on images that are made for this teacher
    python synthesize.py config/synth_mnist_vae.py \\
        --teacher=vae:$P:out/plain/student.safetensors --out_dir=out/synth_plain
    python distill_vae.py --teacher=$P:out/plain/student.safetensors --student=$P --lr=1e-3 \\
        --method=synthetic --data=out/synth_plain

Distances to MNIST (5,000 images, seed 0): the teacher, of 2.2 M parameters and two minutes of a
core, 23.8, the students, of 0.13 M, 30.0 and 28.9. For eval_fid.py they are
--models=$P:out/plain/student.safetensors and so on.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import models as M


class PlainVAE(nn.Module):
    """Images (B, C, H, W) in [0, 1]; the latents are (B, latents, 1, 1), one level in the lists of
    distill_vae.py. The pixels are Gaussians whose mean the decoder gives, of variance beta / 2."""

    def __init__(self, image_size=32, in_channels=3, width=64, latents=128):
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.latents = latents
        channels = [in_channels, width, 2 * width, 4 * width]
        sides = [image_size]
        for _ in range(3):
            sides.append(sides[-1] // 2)
        self.bottom = channels[-1], sides[-1], sides[-1]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for i in range(3):
            self.down.append(nn.Conv2d(channels[i], channels[i + 1], 4, stride=2, padding=1))
        for i in reversed(range(3)):
            odd = sides[i] - 2 * sides[i + 1]  # 1 where the side was odd before it was halved
            self.up.append(
                nn.ConvTranspose2d(
                    channels[i + 1], channels[i], 4, stride=2, padding=1, output_padding=odd
                )
            )
        self.mean = nn.Linear(math.prod(self.bottom), latents)
        self.logvar = nn.Linear(math.prod(self.bottom), latents)
        self.start = nn.Linear(latents, math.prod(self.bottom))

    def noise(self, n, generator=None):
        """Standard normal noise for n images: [(n, latents, 1, 1)]."""
        device = self.start.weight.device
        return [torch.randn(n, self.latents, 1, 1, generator=generator, device=device)]

    def encode(self, x):
        """[(mean, std)] of the posterior of x (B, C, H, W)."""
        h = x
        for layer in self.down:
            h = F.relu(layer(h))
        h = h.flatten(1)
        mean = self.mean(h).float()
        std = (self.logvar(h).float() / 2).exp()
        return [(mean[:, :, None, None], std[:, :, None, None])]

    def decode(self, noise, seen=None):
        """(images, q, p) from z = mean + std * noise: q are the Gaussians that z is drawn from, the
        posterior `seen` if given, and p those of the prior."""
        p = torch.zeros_like(noise[0]), torch.ones_like(noise[0])
        q = seen[0] if seen else p
        z = q[0] + q[1] * noise[0]
        h = self.start(z.flatten(1)).unflatten(1, self.bottom)
        for layer in self.up:
            h = layer(F.relu(h))
        return h.float().sigmoid(), [q], [p]

    def elbo(self, x, noise, beta=0.1):
        """(nll (B,), [KL (B,)]), as of models.LVAE; their sum is the negative ELBO in nats."""
        out, q, p = self.decode(noise, self.encode(x))
        nll = (out - x) ** 2 / beta + math.log(math.pi * beta) / 2
        return nll.sum((1, 2, 3)), [M.gaussian_kl(q[0], p[0])]


build = PlainVAE
