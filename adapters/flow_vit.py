"""
An example of an adapter: a network, a checkpoint and a process that this project does not know, as
teacher and as student. It is the flow ViT of digits of
github.com/sofia-dominguezc/MNIST-diffusion (MIT licence), whose file is DiffusionViT.pth. The
network predicts the image from u = t image + (1 - t) noise, with images in [0, 1] and t from 0,
noise, to 1.

    python dkdm.py --teacher=adapters/flow_vit.py:DiffusionViT.pth --student_prediction=x0
    torchrun --nproc_per_node=2 few_steps.py --student=adapters/flow_vit.py --jumps=8 \\
        --walks=4096 --lr=1e-3 --batch_size=128 --lr_warmup=200 --max_steps=8000
"""
import math

import torch
import torch.nn as nn

import models as M


class FlowViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 64, 7, stride=7)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 16, 64))
        self.y_encoder = nn.Embedding(11, 128)  # the last row is "no label"
        layers = []
        for _ in range(4):
            layers.append(
                nn.TransformerEncoderLayer(64, 4, 256, activation='gelu', batch_first=True)
            )
        self.transformer = nn.Sequential(*layers)
        self.unpatch = nn.ConvTranspose2d(64, 1, 7, stride=7)

    def forward(self, u, t, y):
        x = self.patch_embed(u).flatten(2).transpose(1, 2) + self.pos_embed  # (B, 16, 64)
        freqs = torch.exp(-math.log(10000) * torch.arange(64, device=t.device) / 63)
        args = t[:, None] * freqs
        # two tokens of t and two of y, where y = -1 is row 10
        extra = torch.cat([args.sin(), args.cos(), self.y_encoder(y % 11)], dim=1).view(-1, 4, 64)
        x = self.transformer(torch.cat([x, extra.to(x.dtype)], dim=1))[:, :16]
        return self.unpatch(x.transpose(1, 2).unflatten(2, (4, 4)))


class Ours(FlowViT):
    """The same network behind the project's interface. `flow`: it runs on its own process, as
    published; otherwise on that of its teacher."""

    image_size = 28
    in_channels = 1
    num_classes = 10
    flow = False

    def forward(self, x_t, t, y=None):
        y = torch.full_like(t, -1) if y is None else y
        t = 1 - (t + 1) / 1001  # ours runs from image to noise
        if not self.flow:
            return super().forward(x_t, t, y)
        # x_t is u, of images in [-1, 1], divided by its standard deviation
        norm = (t ** 2 / 4 + (1 - t) ** 2).sqrt().view(-1, 1, 1, 1)
        return 2 * super().forward(x_t * norm + t.view(-1, 1, 1, 1) / 2, t, y) - 1


def load(path='DiffusionViT.pth'):
    """The published network and its process, of a teacher."""
    net = Ours()
    net.flow = True
    net.load_state_dict(torch.load(path, weights_only=True))
    t = 1 - torch.arange(1, 1001, dtype=torch.float64) / 1001
    betas = M.betas_from_alpha_bar((t / 2) ** 2 / (t ** 2 / 4 + (1 - t) ** 2))
    return net, M.Diffusion(betas.tolist(), prediction='x0', learn_sigma=False)


def build(image_size, in_channels, num_classes):
    """The network with random weights, of a student."""
    return Ours()
