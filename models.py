"""
Everything that the scripts share, in the order in which a reader needs it:

    networks            UNet, DiT; classifier, preprocess; LVAE, combine, gaussian_kl
    diffusion           Diffusion: the process, its steps and losses; guided, sampling_steps, sample
    loading and saving  files: die, explained, read_lines, check_folder, write_atomically
                        weights: save_model, make, read_weights, digest, load_state
                        diffusers: Pipeline, decode, read_pipeline, open_pipeline, load_part
                        make_student, load_denoiser, load_classifier, load_vae
                        images: load_images, to_float, to_uint8, save_grid
    measuring           features, load_features, read_statistics, frechet_distance
    running             start, share, pick_dtype, cast_frozen, largest, one_first, stop_flag, leave, update_ema
                        checkpoints: claim, save_checkpoint, load_checkpoint, resume, go_on, Log

Conventions. Images are float32 NCHW in [-1, 1]. `t` is a long tensor (B,), 0 ... T-1; `x_t` at `t` is what the
network sees when it predicts the step to `t-1`; `s = -1` means the clean image. A class label of -1 is the null
condition of classifier-free guidance. What is wrong with a file, a setting or a network is a ValueError of one line.
"""
import contextlib
import csv
import glob
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch.utils._pytree import tree_leaves

# ----------------------------------------------------------------------------------------------------------------
# networks
# ----------------------------------------------------------------------------------------------------------------

def timestep_embedding(t, dim, max_period=10000):
    """Sinusoids of t, (B,) -> (B, dim); cosines first, as in Improved DDPM and DiT."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    args = t[:, None].float() * freqs
    return F.pad(torch.cat([args.cos(), args.sin()], dim=-1), (0, dim % 2))


def zero_init(module):
    """A residual branch whose last layer is zero starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(channels):
    return nn.GroupNorm(math.gcd(32, channels), channels)


class Upsample(nn.Module):
    """Every pixel of (B, C, H, W) four times; on CPUs by two copies, several times faster than F.interpolate."""

    def forward(self, x):
        if not x.is_cpu:
            return F.interpolate(x, scale_factor=2.)
        B, C, H, W = x.shape
        x = torch.stack([x, x], dim=-1).flatten(3)
        return torch.cat([x, x], dim=-1).view(B, C, 2 * H, 2 * W)


class ResBlock(nn.Module):
    """ADM's residual block; `resample` is None, 'down' or 'up' (BigGAN style: on both branches, without weights)."""

    def __init__(self, in_ch, out_ch, emb_ch, dropout, scale_shift, resample=None):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = {None: nn.Identity(), 'down': nn.AvgPool2d(2), 'up': Upsample()}[resample]
        self.in_layers = nn.Sequential(group_norm(in_ch), nn.SiLU(), nn.Conv2d(in_ch, out_ch, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_ch, (2 if scale_shift else 1) * out_ch))
        self.out_layers = nn.Sequential(group_norm(out_ch), nn.SiLU(), nn.Dropout(dropout),
                                        zero_init(nn.Conv2d(out_ch, out_ch, 3, padding=1)))
        self.skip_connection = nn.Identity() if in_ch == out_ch else nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x, emb):
        (norm1, act, conv1), (norm2, _, dropout, conv2) = self.in_layers, self.out_layers
        h = conv1(self.resample(act(norm1(x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + emb)
        return self.skip_connection(self.resample(x)) + conv2(dropout(act(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all positions. The two orders differ only in how the qkv channels are cut into heads."""

    def __init__(self, channels, num_heads, new_order):
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        # the 1x1 convolutions as linear layers: with the channels last in memory attention takes its fast path
        h = self.norm(x).flatten(2).transpose(1, 2)                            # (B, H*W, C)
        qkv = F.linear(h, self.qkv.weight[:, :, 0], self.qkv.bias)
        if self.new_order:
            q, k, v = qkv.view(B, H * W, 3, self.num_heads, -1).transpose(1, 3).unbind(2)
        else:
            q, k, v = qkv.view(B, H * W, self.num_heads, 3, -1).transpose(1, 2).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v)                            # (B, heads, H*W, C/heads)
        h = F.linear(h.transpose(1, 2).reshape(B, H * W, C), self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class Stack(nn.ModuleList):
    """Layers in a row, of which the residual blocks look at the time embedding."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """The U-Net of ADM / Improved DDPM (Dhariwal & Nichol 2021, Nichol & Dhariwal 2021).

    x (B, in_channels, image_size, image_size), t (B,), y (B,) or None -> (B, out_channels, image_size, image_size).
    Parameter names and shapes are ADM's, so checkpoints of ADM, DDPM-IP, DKDM and LDM load with strict=True.
    `attention_resolutions` are sides of feature maps (after `patch_size`, which folds pixels into channels on the way
    in and out). `num_classes = 0` is unconditional; the label -1 adds no embedding.
    """

    def __init__(self, image_size, in_channels=3, out_channels=3, model_channels=128, num_res_blocks=3,
                 channel_mult=(1, 2, 2, 2), attention_resolutions=(16, 8), num_heads=4, num_head_channels=32,
                 dropout=0., num_classes=0, use_scale_shift_norm=True, resblock_updown=True,
                 use_new_attention_order=True, patch_size=1):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ('self', '__class__')} | {'class': 'UNet'}
        side = image_size // patch_size
        if image_size % patch_size or side % 2 ** (len(channel_mult) - 1):
            raise ValueError(f'image_size {image_size} cannot be cut into patches of {patch_size} and then halved '
                             f'{len(channel_mult) - 1} times: fewer entries in channel_mult or another patch_size')
        self.model_channels, self.patch_size, self.num_classes = model_channels, patch_size, num_classes
        emb_ch = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_ch), nn.SiLU(), nn.Linear(emb_ch, emb_ch))
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, emb_ch)

        def res(in_ch, out_ch, resample=None):
            return ResBlock(in_ch, out_ch, emb_ch, dropout, use_scale_shift_norm, resample)

        def attention(ch):
            heads = num_heads if num_head_channels == -1 else max(1, ch // num_head_channels)
            if ch % heads:
                raise ValueError(f'{ch} channels cannot be cut into {heads} attention heads')
            return AttentionBlock(ch, heads, use_new_attention_order)

        def layers(in_ch, out_ch):                                             # at the present side
            return [res(in_ch, out_ch)] + ([attention(out_ch)] if side in attention_resolutions else [])

        widths = [int(mult * model_channels) for mult in channel_mult]
        ch = widths[0]
        self.input_blocks = nn.ModuleList([Stack([nn.Conv2d(in_channels * patch_size ** 2, ch, 3, padding=1)])])
        skips = [ch]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stack(layers(ch, width)))
                ch = width
                skips.append(ch)
            if level < len(widths) - 1:
                self.input_blocks.append(Stack([res(ch, ch, 'down') if resblock_updown else nn.Sequential(
                    OrderedDict(op=nn.Conv2d(ch, ch, 3, stride=2, padding=1)))]))
                skips.append(ch)
                side //= 2
        self.middle_block = Stack([res(ch, ch), attention(ch), res(ch, ch)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                block = Stack(layers(ch + skips.pop(), width))
                ch = width
                if level and i == num_res_blocks:
                    block.append(res(ch, ch, 'up') if resblock_updown else nn.Sequential(
                        OrderedDict(up=Upsample(), conv=nn.Conv2d(ch, ch, 3, padding=1))))
                    side *= 2
                self.output_blocks.append(block)
        self.out = nn.Sequential(group_norm(ch), nn.SiLU(),
                                 zero_init(nn.Conv2d(ch, out_channels * patch_size ** 2, 3, padding=1)))

    def forward(self, x, t, y=None):
        emb = self.time_embed(timestep_embedding(t, self.model_channels))
        dtype = emb.dtype                                                      # what autocast computes in
        if self.num_classes and y is not None:
            emb = emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]
        with torch.autocast(x.device.type, enabled=False):                     # bfloat16 rounds small noise away
            h = self.input_blocks[0](F.pixel_unshuffle(x, self.patch_size), emb).to(dtype)
        skips = [h]
        for block in self.input_blocks[1:]:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.out(h), self.patch_size)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.num_heads = num_heads
        mlp = int(hidden_size * mlp_ratio)
        self.attn = nn.ModuleDict({'qkv': nn.Linear(hidden_size, 3 * hidden_size),
                                   'proj': nn.Linear(hidden_size, hidden_size)})
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(hidden_size, mlp), 'fc2': nn.Linear(mlp, hidden_size)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        B, N, D = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.attn['qkv'](h).view(B, N, 3, self.num_heads, -1).transpose(1, 3).unbind(2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + gate1 * self.attn['proj'](h)
        h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp['fc2'](F.gelu(self.mlp['fc1'](h), approximate='tanh'))


class DiT(nn.Module):
    """Diffusion transformer (Peebles & Xie 2023); parameter names are those of its authors' checkpoints.

    x (B, in_channels, image_size, image_size), t (B,), y (B,) or None -> the same size, with twice the channels if
    `learn_sigma`. `num_classes = 0` is unconditional; otherwise row `num_classes` of the label table is the null
    condition, which y = None and y = -1 select.
    """

    def __init__(self, image_size, patch_size=2, in_channels=4, hidden_size=384, depth=12, num_heads=6, mlp_ratio=4.,
                 num_classes=1000, learn_sigma=True):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ('self', '__class__')} | {'class': 'DiT'}
        if image_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f'image_size {image_size} must be a multiple of patch_size {patch_size}, and hidden_size '
                             f'{hidden_size} of num_heads {num_heads} and of 4')
        self.patch_size, self.num_classes = patch_size, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        grid = image_size // patch_size
        # fixed 2-D sine-cosine positions: the first half of the channels for the column, the second for the row
        pos = torch.arange(grid).repeat(grid), torch.arange(grid).repeat_interleave(grid)
        table = torch.cat([timestep_embedding(p, hidden_size // 2).roll(hidden_size // 4, dims=1) for p in pos], dim=1)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.x_embedder = nn.ModuleDict({'proj': nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)})
        self.t_embedder = nn.ModuleDict({'mlp': nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(),
                                                              nn.Linear(hidden_size, hidden_size))})
        if num_classes:
            self.y_embedder = nn.ModuleDict({'embedding_table': nn.Embedding(num_classes + 1, hidden_size)})
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = nn.ModuleDict({
            'linear': nn.Linear(hidden_size, patch_size ** 2 * self.out_channels),
            'adaLN_modulation': nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))})
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder['proj'].weight.view(hidden_size, -1))
        nn.init.zeros_(self.x_embedder['proj'].bias)
        tables = [self.y_embedder['embedding_table']] if num_classes else []
        for m in [self.t_embedder['mlp'][0], self.t_embedder['mlp'][2], *tables]:
            nn.init.normal_(m.weight, std=0.02)
        for m in [b.adaLN_modulation for b in self.blocks] + list(self.final_layer.values()):
            zero_init(m)

    def forward(self, x, t, y=None):
        B, p = len(x), self.patch_size
        with torch.autocast(x.device.type, enabled=False):                     # bfloat16 rounds small noise away
            h = self.x_embedder['proj'](x)
        grid = h.shape[-1]
        h = h.flatten(2).transpose(1, 2) + self.pos_embed                      # (B, grid*grid, hidden)
        c = self.t_embedder['mlp'](timestep_embedding(t, 256))
        if self.num_classes:
            y = torch.full_like(t, -1) if y is None else y
            c = c + self.y_embedder['embedding_table'](torch.where(y < 0, self.num_classes, y))
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer['adaLN_modulation'](c)[:, None].chunk(2, dim=-1)
        h = self.final_layer['linear'](F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        h = h.view(B, grid, grid, p, p, self.out_channels)
        return torch.einsum('nhwpqc->nchpwq', h).reshape(B, self.out_channels, grid * p, grid * p)


class ResidualBlock(nn.Module):
    """conv-BN-ReLU ... conv-BN plus shortcut, then ReLU: 3x3 twice or, a bottleneck, 1x1 - 3x3 - 1x1 at a quarter of
    the width; of the image at `side` pixels, if given. The shortcut's name differs between families, as its kind does:
    'conv' (with BN), 'pad' (zeros for new channels) or a ladder's, 'bare' (without BN, before the rest)."""

    def __init__(self, in_ch, out_ch, stride, skip, kind='conv', bottleneck=False, side=None):
        super().__init__()
        mid, extra = out_ch // 4, (out_ch - in_ch) // 2
        convs = ((in_ch, mid, 1, 1), (mid, mid, 3, stride), (mid, out_ch, 1, 1)) if bottleneck else (
            (in_ch, out_ch, 3, stride), (out_ch, out_ch, 3, 1))
        self.depth, self.skip, self.side = len(convs), skip, side
        if kind == 'bare':
            self.add_module(skip, nn.Conv2d(in_ch, out_ch, 1, stride, bias=False))
        for i, (a, b, kernel, by) in enumerate(convs, 1):
            self.add_module(f'conv{i}', nn.Conv2d(a, b, kernel, by, kernel // 2, bias=False))
            self.add_module(f'bn{i}', nn.BatchNorm2d(b))
        if kind != 'bare' and in_ch == out_ch and stride == 1:
            self.add_module(skip, nn.Identity())
        elif kind == 'pad':
            self.add_module(skip, nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, extra, extra))))
        elif kind == 'conv':
            conv = nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)
            self.add_module(skip, nn.Sequential(conv, nn.BatchNorm2d(out_ch)))

    def forward(self, x):
        h = x = F.interpolate(x, size=(self.side, self.side)) if self.side else x
        for i in range(1, self.depth + 1):
            h = self.get_submodule(f'bn{i}')(self.get_submodule(f'conv{i}')(h))
            h = F.relu(h if i < self.depth else h + self.get_submodule(self.skip)(x))
        return h


class WideBlock(nn.Module):
    """BN-ReLU-conv twice; where the width changes, the shortcut starts after the first BN-ReLU."""

    def __init__(self, in_ch, out_ch, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_ch), nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out_ch), nn.Conv2d(out_ch, out_ch, 3, 1, 1, bias=False)
        if in_ch != out_ch:
            self.convShortcut = nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)

    def forward(self, x):
        h = F.relu(self.bn1(x))
        skip = self.convShortcut(h) if hasattr(self, 'convShortcut') else x
        return skip + self.conv2(F.relu(self.bn2(self.conv1(h))))


def stages(name, block, counts, in_ch, widths, *more):
    """Stages name1, name2 ... of blocks in a row, each but the first at half the resolution of the one before."""
    found = {}
    for i, (count, out_ch) in enumerate(zip(counts, widths), 1):
        found[f'{name}{i}'] = nn.Sequential(*[
            block(out_ch if j else in_ch, out_ch, 1 if j or i == 1 else 2, *more) for j in range(count)])
        in_ch = out_ch
    return found


class Classifier(nn.Module):
    """Named layers in a row, some of which end a stage; the last is linear and sees the mean of the last map."""

    def __init__(self, layers, ends):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.ends, self.head_name = ends, name

    def forward_features(self, x):
        maps = []
        *layers, (_, head) = self.named_children()
        for name, layer in layers:
            x = layer(x)
            if name in self.ends:
                maps.append(x)
        return head(x.mean((2, 3))), maps

    def forward(self, x):
        return self.forward_features(x)[0]


def resnet(depth, num_classes=10, in_channels=3, width=None, shortcut='conv'):
    """CIFAR ResNets: depth 6n+2 has three stages (He et al. 2016); 18, 34 and 50 are ImageNet's with a 3x3 stem."""
    deep = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
    counts, bottleneck = deep.get(depth) or [(depth - 2) // 6] * 3, depth == 50
    if shortcut not in ('conv', 'pad'):
        raise ValueError(shortcut)
    skip, head = ('shortcut', 'linear') if depth in deep else ('downsample', 'fc')
    width = width or (64 if depth in deep else 16)
    layers = {'conv1': nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), 'bn1': nn.BatchNorm2d(width),
              'relu': nn.ReLU()}
    widths = [width * 2 ** i * (4 if bottleneck else 1) for i in range(len(counts))]
    maps = stages('layer', ResidualBlock, counts, width, widths, skip, shortcut, bottleneck)
    return Classifier(layers | maps | {head: nn.Linear(widths[-1], num_classes)}, [*maps])


def wide_resnet(depth, widen, num_classes=10, in_channels=3):
    """Wide ResNet (Zagoruyko & Komodakis 2016), depth 6n+4."""
    layers, widths = {'conv1': nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)}, [16 * widen * 2 ** i for i in range(3)]
    for name, blocks in stages('block', WideBlock, [(depth - 4) // 6] * 3, 16, widths).items():
        layers[name] = nn.Sequential(OrderedDict(layer=blocks))
    layers |= {'bn1': nn.BatchNorm2d(widths[-1]), 'relu': nn.ReLU(), 'fc': nn.Linear(widths[-1], num_classes)}
    return Classifier(layers, ('block1', 'block2', 'relu'))


class PoolLarge(nn.MaxPool2d):
    """The fourth halving of a VGG, of images from 64 pixels on: the last map of 32 and of 64 pixels is 4x4."""

    def forward(self, x):
        return super().forward(x) if x.shape[-1] >= 8 else x


def vgg(depth, num_classes=10, in_channels=3):
    """VGG with BatchNorm and one linear layer (Simonyan & Zisserman 2015), as used on CIFAR."""
    counts = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]
    layers, ch = {}, in_channels
    for i, (count, out_ch) in enumerate(zip(counts, (64, 128, 256, 512, 512))):
        block = []
        for _ in range(count):
            block += [nn.Conv2d(ch, out_ch, 3, padding=1), nn.BatchNorm2d(out_ch), nn.ReLU()]
            ch = out_ch
        layers[f'block{i}'] = nn.Sequential(*block)
        if i < 4:
            layers[f'pool{i}'] = nn.MaxPool2d(2) if i < 3 else PoolLarge(2)
    return Classifier(layers | {'classifier': nn.Linear(ch, num_classes)}, [f'block{i}' for i in range(5)])


class Torchvision(nn.Module):
    """A classifier of torchvision; its maps are the last one of every resolution."""

    def __init__(self, name, num_classes=1000, in_channels=3, weights=None):
        super().__init__()
        import torchvision
        if in_channels != 3:
            raise ValueError('colour images only')
        self.net = torchvision.models.get_model(name, weights=weights, num_classes=num_classes)
        self.head_name = [f'net.{k}' for k, m in self.net.named_modules() if isinstance(m, nn.Linear)][-1]

    def forward_features(self, x):
        maps = {}                                                              # the sides of a map -> the map
        hooks = [m.register_forward_hook(lambda m, args, out: maps.update({out.shape[2:]: out}))
                 for m in getattr(self.net, 'features', self.net).children()]
        logits = self.net(x)
        for h in hooks:
            h.remove()
        return logits, [m for m in maps.values() if m.dim() == 4 and m.shape[-1] > 1][-4:]

    def forward(self, x):
        return self.net(x)


def classifier(name, num_classes=10, image_size=32, mean=(0.5,), std=(0.5,), **kw):
    """An image classifier by name: resnet8...110 (6n+2), resnet18/34/50, wrn16_1...40_2, vgg11/13/16/19, or
    torchvision:NAME. kw: in_channels; width and shortcut ('conv' or 'pad') of the ResNets. `forward(x)` gives logits
    (B, num_classes), `forward_features(x)` also the last map of every stage; the mean of the last one over its pixels
    is what the linear layer sees. `image_size`, `mean` and `std` (of images in [0, 1]) belong to `preprocess`. Raises
    ValueError for an unknown name."""
    try:
        if name.startswith('torchvision:'):
            net = Torchvision(name.partition(':')[2], num_classes, **kw)
        else:
            family, sizes = re.fullmatch('([a-z]+)([0-9_]+)', name).groups()
            family, depths = {'resnet': (resnet, {18, 34, 50, *range(8, 1210, 6)}), 'vgg': (vgg, {11, 13, 16, 19}),
                              'wrn': (wide_resnet, range(10, 1000, 6))}[family]
            depth, *widen = map(int, sizes.split('_'))
            if depth not in depths:
                raise ValueError
            net = family(depth, *widen, num_classes=num_classes, **kw)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f'no classifier {name!r} with {kw}: resnet8, 14, 20 ... 110 or resnet18, 34, 50 (in_channels, '
                         'width, shortcut), wrn16_1 ... wrn40_2, vgg11, 13, 16, 19 (in_channels), torchvision:resnet34 '
                         'and its like') from None
    if any(len(v) not in (1, kw.get('in_channels', 3)) or not low < min(v) <= max(v) < 9
           for v, low in ((mean, -9), (std, 0))):
        raise ValueError(f'mean={mean} and std={std}: one number or one per channel, std above 0')
    net.config = {'class': 'classifier', 'name': name, 'num_classes': num_classes, 'image_size': image_size,
                  'mean': mean, 'std': std} | kw
    return net


def resize(images, size):
    """Float images (B, C, H, W) as squares of `size` a side."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode='bilinear', antialias=True, align_corners=False)


def preprocess(net, images):
    """What a classifier of ours expects of images (B, C, H, W) in [-1, 1]: its size, mean and standard deviation."""
    if getattr(net, 'mean', None) is None or net.mean.device != images.device:   # sent to the device once
        net.mean, net.std = (torch.tensor(net.config[k], device=images.device).view(1, -1, 1, 1)
                             for k in ('mean', 'std'))
    images = resize(images, net.config['image_size'])
    return ((images + 1) / 2 - net.mean.to(images)) / net.std.to(images)


class LadderLevel(nn.Module):
    """Two blocks, the first at half ('downsample') or twice ('upsample', to `side`) the resolution, or at the same; and
    what a Gaussian is made of."""

    def __init__(self, in_ch, width, out_ch, resample=None, side=None):
        super().__init__()
        first = 2 if resample == 'downsample' else 1, resample or 'same', 'bare' if resample else 'conv', False, side
        self.net = nn.Sequential(ResidualBlock(in_ch, width, *first), ResidualBlock(width, width, 1, 'same'))
        self.out = nn.Conv2d(width, out_ch, 1, bias=False)


def gaussian(out):
    """(mean, std) of 2C channels; zeros are the standard normal. The constant is the original's ln 2."""
    mean, s = out.float().chunk(2, dim=1)
    return mean, F.softplus(s) / 0.6931 + 1e-6


class LVAE(nn.Module):
    """Ladder VAE (Sonderby et al. 2016) with 16-channel latents at every halving of the image down to 1x1: 16, 8, 4,
    2, 1 for 32 pixels, 14, 7, 4, 2, 1 for 28. Width 128 at 32 pixels is the slides' teacher, 8 their student. Images
    (B, C, H, W) are in [0, 1] here. Lists over levels start at the finest; noise is a list of (B, 16, h, w). A
    decoder's output has 2C channels, of which the first C are the mean of the pixels; their std is sqrt(beta / 2)."""

    def __init__(self, image_size=32, in_channels=3, width=128):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ('self', '__class__')} | {'class': 'LVAE'}
        self.sides = [image_size]
        while self.sides[-1] > 1:
            self.sides.append(-(-self.sides[-1] // 2))
        self.levels = len(self.sides) - 1
        self.u1 = nn.Sequential(nn.Conv2d(in_channels, width, 5, stride=2, padding=2), LadderLevel(width, width, 32))
        for i in range(2, self.levels + 1):
            self.add_module(f'u{i}', LadderLevel(width, width, 32, 'downsample'))
        for i in reversed(range(self.levels)):
            self.add_module(f'd{i}', LadderLevel(16, width, 32 if i else 2 * in_channels, 'upsample', self.sides[i]))

    def noise(self, n, generator=None):
        """Standard normal noise for n images, of a generator on the network's device."""
        device = self.d0.out.weight.device
        return [torch.randn(n, 16, side, side, generator=generator, device=device) for side in self.sides[1:]]

    def encode(self, x):
        """What the image alone says of each level: a list of (mean, std), bottom-up. Raises ValueError outside
        [0, 1]."""
        check_images(x, self.config)
        h, found = self.u1[0](x), []
        for i in range(1, self.levels + 1):
            level = self.u1[1] if i == 1 else self.get_submodule(f'u{i}')
            h = level.net(h)
            found.append(gaussian(level.out(h)))
        return found

    def decode(self, noise, seen=None):
        """(out, q, p) on the way down with z = mean + std noise: p the prior Gaussians, each given the z above it, and
        q those that z is drawn from. Without `seen` that is the prior; with it, from `encode`, the two are weighted by
        their precisions, and the top is what the image says."""
        p, q = [None] * self.levels, [None] * self.levels
        p[-1] = torch.zeros_like(noise[-1]), torch.ones_like(noise[-1])
        q[-1] = seen[-1] if seen else p[-1]
        z = q[-1][0] + q[-1][1] * noise[-1]
        for i in reversed(range(self.levels - 1)):
            level = self.get_submodule(f'd{i + 1}')
            p[i] = gaussian(level.out(level.net(z)))
            q[i] = combine(seen[i], p[i]) if seen else p[i]
            z = q[i][0] + q[i][1] * noise[i]
        return self.d0.out(self.d0.net(z)).float(), q, p

    def generate(self, noise):
        """(out (B, 2C, H, W), p): images from the prior and its Gaussians, a list of (mean, std)."""
        out, _, p = self.decode(noise)
        return out, p

    def forward(self, x, noise):
        """(out, q, p): the reconstruction of x in [0, 1], the posterior and the prior Gaussians on its way."""
        return self.decode(noise, self.encode(x))

    def elbo(self, x, noise, beta=0.1):
        """(nll (B,), [KL of each level (B,)]) of images in [0, 1]; their sum is the negative ELBO in nats."""
        out, q, p = self(x, noise)
        nll = 0.5 * ((out[:, :x.shape[1]] - x) ** 2 * 2 / beta + math.log(math.pi * beta))
        return nll.sum((1, 2, 3)), [gaussian_kl(a, b) for a, b in zip(q, p)]


def check_images(x, config):
    """A VAE's images: its channels and, where it has one, its size, in [0, 1]. For a look at values the host would
    wait for a GPU: there the scripts' uint8 / 255 has to do."""
    side = config['image_size'] if config['class'] == 'LVAE' else x.shape[2]
    if x.shape[1:] != (config['in_channels'], side, side) or x.is_cpu and (x.min() < 0 or x.max() > 1):
        raise ValueError(f'images {tuple(x.shape[1:])} in [{x.min().item():.2f}, {x.max().item():.2f}]: this '
                         f"{config['class']} takes {(config['in_channels'], side, side)} in [0, 1]")


def combine(a, b):
    """The product of two Gaussians (mean, std), each weighted by its precision."""
    precision_a, precision_b = a[1] ** -2, b[1] ** -2
    var = 1 / (precision_a + precision_b)
    return var * (precision_a * a[0] + precision_b * b[0]), var.sqrt()


def gaussian_kl(q, p):
    """KL(q || p) of diagonal Gaussians (mean, std), (B,)."""
    kl = (p[1] / q[1]).log() + (q[1] ** 2 + (q[0] - p[0]) ** 2) / (2 * p[1] ** 2) - 0.5
    return kl.sum((1, 2, 3))


# ----------------------------------------------------------------------------------------------------------------
# diffusion
# ----------------------------------------------------------------------------------------------------------------

class Diffusion:
    """A forward process x_t = a_t x_0 + b_t eps and what can be computed from a network's output on it.

    schedule: 'cosine', 'linear', 'sqrt_linear' or a list of betas (a = sqrt(alpha_bar), b = sqrt(1 - alpha_bar)),
        or 'flow' (b = (t+1)/T, a = 1 - b; with `shift` b moves towards 1, Esser et al. 2024, Eq. (23)).
    prediction: what the network's first C channels are: 'eps', 'v' = a eps - b x_0, 'x0', or 'flow' = eps - x_0.
    learn_sigma: the network has C more channels, the v of DKDM Eq. (12). What a given output holds is read off its
        channels, so a teacher with and a student without a learned variance go together.
    clip: clamp predicted x_0 to [-1, 1] (pixels yes, latents no).
    A step may jump any distance t -> s, s < t; both are long tensors (B,) or ints, s = -1 the clean image.
    """

    def __init__(self, schedule='cosine', steps=1000, prediction='eps', learn_sigma=True, clip=True,
                 beta_range=(1e-4, 0.02), shift=1.):
        if prediction not in ('eps', 'v', 'x0', 'flow'):
            raise ValueError(f"no prediction {prediction!r}: 'eps', 'v', 'x0' or 'flow'")
        self.config = {k: v for k, v in locals().items() if k != 'self'}
        self.prediction, self.learn_sigma, self.clip = prediction, learn_sigma, clip
        if schedule == 'flow':
            if prediction == 'eps':
                raise ValueError("prediction 'eps' on schedule 'flow': nothing of x_0 is left at t = T-1, so eps does "
                                 "not tell it; 'flow', 'v' or 'x0' do")
            b = np.arange(1, steps + 1) / steps
            b = shift * b / (1 + (shift - 1) * b)
            a = 1 - b
        else:
            if not isinstance(schedule, str):
                betas = np.asarray(schedule, dtype=np.float64)
            elif schedule == 'cosine':                                         # Improved DDPM, Eq. (17)
                f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
                betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
            elif schedule == 'linear':
                betas = np.linspace(*np.array(beta_range) * 1000 / steps, steps)
            elif schedule == 'sqrt_linear':                                    # LDM
                betas = np.linspace(*np.sqrt(beta_range), steps) ** 2
            else:
                raise ValueError(f"no schedule {schedule!r}: 'cosine', 'linear', 'sqrt_linear', 'flow' or betas")
            alpha_bar = np.cumprod(1 - betas)
            a, b = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        if len(a) < 2 or not (np.isfinite(a) & (b > 0) & (b <= 1)).all():
            raise ValueError('fewer than two steps, or betas outside 0 ... 1')
        self.T = len(a)
        # index -1 (the last entry) is the clean image; float64, cast where it meets images
        self.a, self.b = (torch.tensor([*v, end], dtype=torch.float64) for v, end in ((a, 1.), (b, 0.)))
        self.alpha_bar = self.a ** 2 / (self.a ** 2 + self.b ** 2)
        # of a variance, where its logarithm is taken
        self.floor = self.posterior(torch.zeros(1), torch.zeros(1), 1, 0)[1].item()

    def ab(self, t, like):
        """(a_t, b_t) in float64 (MPS has none), shaped to broadcast against images. An int costs no copy to a GPU."""
        if self.a.device != like.device:
            dtype = torch.float32 if like.device.type == 'mps' else torch.float64
            self.a, self.b = self.a.to(like.device, dtype), self.b.to(like.device, dtype)
        return self.a[t].view(-1, 1, 1, 1), self.b[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, noise):
        """x_t ~ q(x_t | x_0), Eq. (4)."""
        a, b = self.ab(t, x0)
        return a.to(x0) * x0 + b.to(x0) * noise

    def target(self, x0, x_t, t, to):
        """The prediction `to` that is exact for this (x_0, x_t): any two of x_0, x_t, eps fix the rest."""
        a, b = self.ab(t, x_t)
        if to == 'x0':
            return x0
        eps = ((x_t - a * x0) / b).to(x_t)
        return {'eps': eps, 'v': (a * eps - b * x0).to(x_t), 'flow': eps - x0}[to]

    def predict_x0(self, out, x_t, t, clip=None):
        """The clean image that a network's output means; clamped if `clip`, which is the process's own by default."""
        out = out[:, :x_t.shape[1]].float()
        a, b = self.ab(t, x_t)
        x0 = {'eps': lambda: (x_t - b * out) / a.clamp(min=1e-8), 'v': lambda: (a * x_t - b * out) / (a ** 2 + b ** 2),
              'flow': lambda: (x_t - b * out) / (a + b), 'x0': lambda: out}[self.prediction]().to(x_t)
        return x0.clamp(-1, 1) if (self.clip if clip is None else clip) else x0

    def convert(self, out, x_t, t, to):
        """A network's output re-expressed as the prediction `to`, through its (clamped) x_0; variance channels stay."""
        if to == self.prediction:
            return out
        mean = self.target(self.predict_x0(out, x_t, t), x_t, t, to)
        return torch.cat([mean, out[:, x_t.shape[1]:].float()], dim=1)

    def posterior(self, x0, x_t, t, s=None):
        """q(x_s | x_t, x_0), Eqs. (5)-(7) for any jump: mean, variance (float64), and the jump's own variance."""
        s = t - 1 if s is None else s
        (a_t, b_t), (a_s, b_s) = self.ab(t, x_t), self.ab(s, x_t)
        r = a_t / a_s
        jump = (b_t ** 2 - r ** 2 * b_s ** 2).clamp(min=0)                     # beta_t where s = t-1
        mean = (a_s * jump / b_t ** 2).to(x_t) * x0 + (r * b_s ** 2 / b_t ** 2).to(x_t) * x_t
        return mean, b_s ** 2 * jump / b_t ** 2, jump

    def mean_logvar(self, out, x_t, t, s=None, clip=None):
        """Mean and log variance of p(x_s | x_t), Eqs. (8) and (12); s = t-1 by default. Both (B, C, H, W). At s = -1
        the posterior has no variance; its logarithm is taken one step earlier, as in Improved DDPM."""
        C = x_t.shape[1]
        mean, var, jump = self.posterior(self.predict_x0(out, x_t, t, clip), x_t, t, s)
        low = var.clamp(min=self.floor).log()
        if out.shape[1] == C:                                                  # fixed variance: the posterior's
            return mean, low.to(x_t).expand_as(x_t)
        v = (out[:, C:].float() + 1) / 2
        return mean, (v * jump.log() + (1 - v) * low).to(x_t)                  # Eq. (12)

    def ddpm_step(self, out, x_t, t, s, noise=None):
        """x_s ~ p(x_s | x_t); no noise where s = -1."""
        mean, logvar = self.mean_logvar(out, x_t, t, s)
        noise = torch.randn_like(x_t) if noise is None else noise
        noisy = (s >= 0).view(-1, 1, 1, 1) if torch.is_tensor(s) else s >= 0
        return mean + noisy * (0.5 * logvar).exp() * noise

    def ddim_step(self, out, x_t, t, s, eta=0., noise=None):
        """DDIM (Song et al. 2021), Eq. (12) there; eta = 1 has the posterior's variance."""
        x0 = self.predict_x0(out, x_t, t)
        a_s, b_s = self.ab(s, x_t)
        sigma = eta * self.posterior(x0, x_t, t, s)[1].sqrt()
        eps = self.target(x0, x_t, t, 'eps')
        x_s = a_s * x0 + (b_s ** 2 - sigma ** 2).clamp(min=0).sqrt() * eps
        if eta:
            x_s = x_s + sigma * (torch.randn_like(x_t) if noise is None else noise)
        return x_s.to(x_t)

    def losses(self, out, target, x_t, true_mean, true_logvar, t, lam, x0=None):
        """L_simple + lam T KL, each (B,), Eqs. (13) and (19). The KL is in bits and trains the variance only: the mean
        is detached in it, and not clamped, as in Improved DDPM. x0, where known, replaces the KL of t = 0 by the
        likelihood of 8-bit pixels."""
        C = x_t.shape[1]
        mse = F.mse_loss(out[:, :C].float(), target, reduction='none').mean((1, 2, 3))
        if out.shape[1] == C or lam == 0:
            return {'loss': mse, 'mse': mse, 'vb': torch.zeros_like(mse)}
        mean, logvar = self.mean_logvar(torch.cat([out[:, :C].detach(), out[:, C:]], dim=1), x_t, t, clip=False)
        kl = 0.5 * (logvar - true_logvar - 1 + (true_logvar - logvar).exp()
                    + (true_mean - mean) ** 2 * (-logvar).exp())
        if x0 is not None:
            kl = torch.where((t == 0).view(-1, 1, 1, 1), pixel_nll(x0, mean, logvar), kl)
        vb = lam * self.T * kl.mean((1, 2, 3)) / math.log(2)
        return {'loss': mse + vb, 'mse': mse, 'vb': vb}

    def training_loss(self, out, x0, x_t, t, noise, lam=0.001):
        """Training on images, Eqs. (9), (11), (13): a dict of (B,) tensors 'loss', 'mse', 'vb'."""
        mean, var, _ = self.posterior(x0, x_t, t)
        var = var.clamp(min=self.floor)
        a, b = self.ab(t, x_t)
        target = {'eps': noise, 'x0': x0, 'v': (a * noise - b * x0).to(x0), 'flow': noise - x0}[self.prediction]
        return self.losses(out, target, x_t, mean, var.log().to(x_t), t, lam, x0)

    def distill_loss(self, student_out, teacher_out, x_t, t, lam=0.001):
        """Training on a teacher's output in this process's prediction, Eqs. (19)-(21); a dict as above."""
        teacher_out = teacher_out.detach().float()
        mean, logvar = self.mean_logvar(teacher_out, x_t, t)
        return self.losses(student_out, teacher_out[:, :x_t.shape[1]], x_t, mean, logvar, t, lam)


def pixel_nll(x, mean, logvar):
    """-log of the Gaussian's mass in the 8-bit bin of x in [-1, 1] (Ho et al. 2020, Eq. (13)); outer bins are open."""
    def cdf(z):
        return 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    inv_std = (-0.5 * logvar).exp()
    up = torch.where(x > 0.999, 1., cdf((x - mean + 1 / 255) * inv_std))
    down = torch.where(x < -0.999, 0., cdf((x - mean - 1 / 255) * inv_std))
    return -(up - down).clamp(min=1e-12).log()


def guided(net, x_t, t, y=None, guidance=1.):
    """The network's output under classifier-free guidance (Ho & Salimans 2022): null + guidance (cond - null), of two
    evaluations; one where guidance = 1 or there is no condition. The variance is the conditional one."""
    if y is None or guidance == 1:
        return net(x_t, t, y)
    C = x_t.shape[1]
    cond, null = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, -1)])).chunk(2)
    return torch.cat([null[:, :C] + guidance * (cond - null)[:, :C], cond[:, C:]], dim=1)


def sampling_steps(T, steps, spacing='trailing'):
    """Timesteps, from noise to image: 'trailing' evenly from T-1, the last jump as long as the others (Lin et al.
    2024); 'even' with both ends, T-1 and 0 (Improved DDPM); 'leading' at multiples of T // steps, from below T-1
    (DDIM)."""
    if not 1 <= steps <= T:
        raise ValueError(f'{steps} sampling steps: from 1 to {T}')
    if spacing == 'leading':
        return list(range(0, T, T // steps))[:steps][::-1]
    if spacing == 'even' and steps > 1:
        return [round(i * (T - 1) / (steps - 1)) for i in range(steps)][::-1]
    return [round(T - i * T / steps) - 1 for i in range(steps)]


@torch.inference_mode()
def sample(net, diffusion, shape_or_noise, steps=50, sampler='ddpm', y=None, guidance=1., generator=None, eta=0.,
           spacing='trailing'):
    """Images (B, C, H, W), float32, from a network and its process. shape_or_noise: (B, C, H, W), or the noise itself.
    generator: of that noise and of every step's. sampler: 'ddpm' (ancestral), 'ddim' (with `eta`) or 'dpm++' (the
    multistep solver of diffusers, second order). y: labels (B,), -1 for none. spacing: of the timesteps
    (`sampling_steps`). Raises ValueError for a number of steps that the process does not have."""
    from diffusers.utils.torch_utils import randn_tensor
    device = next(net.parameters()).device
    x = shape_or_noise if torch.is_tensor(shape_or_noise) else randn_tensor(shape_or_noise, generator, device)
    ts = sampling_steps(diffusion.T, steps, spacing)
    if sampler == 'dpm++':
        from diffusers import DPMSolverMultistepScheduler
        # any path a x_0 + b eps is a variance-preserving one after division by sqrt(a^2 + b^2)
        norm, alpha_bar = (diffusion.a ** 2 + diffusion.b ** 2).sqrt().cpu(), diffusion.alpha_bar[:-1].clamp(min=1e-9)
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
        scheduler = DPMSolverMultistepScheduler(trained_betas=betas.numpy(), num_train_timesteps=diffusion.T,
                                                prediction_type='sample', lower_order_final=True)
        scheduler.set_timesteps(timesteps=ts)
        x = x / norm[ts[0]].to(x)
    for t, s in zip(ts, ts[1:] + [-1]):
        tt = torch.full((len(x),), t, device=device)
        x_t = x * norm[t].to(x) if sampler == 'dpm++' else x
        out = guided(net, x_t, tt, y, guidance)
        noise = randn_tensor(x.shape, generator, device) if sampler == 'ddpm' or eta else None
        if sampler == 'dpm++':
            x = scheduler.step(diffusion.predict_x0(out, x_t, tt), t, x, return_dict=False)[0]
        elif sampler == 'ddpm':
            x = diffusion.ddpm_step(out, x, tt, s, noise)
        else:
            x = diffusion.ddim_step(out, x, tt, s, eta, noise)
    return x


# ----------------------------------------------------------------------------------------------------------------
# loading and saving
# ----------------------------------------------------------------------------------------------------------------

WEIGHTS = ('.safetensors', '.pt', '.pth', '.th', '.ckpt', '.bin')               # files, as against hub ids
DIFFUSERS = 'UNet2DModel', 'UNet2DConditionModel', 'DiTTransformer2DModel', 'SD3Transformer2DModel'    # its networks
UNUSED = 'safety_checker', 'feature_extractor', 'image_encoder', 'watermarker'  # parts of its pipelines


def die(message):
    """One line on stderr and exit code 2: what was wrong and what would be right."""
    if os.environ.get('RANK', '0') != '0' and os.environ.get('WORLD_SIZE', '1') != '1':
        time.sleep(6)                                                          # rank 0 speaks, where it has it too
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def first_line(e):
    """What an exception says, as one line."""
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


@contextlib.contextmanager
def explained(what):
    """Whatever goes wrong inside becomes a ValueError of one line: what it was about, and what the library says."""
    try:
        yield
    except Exception as e:
        raise ValueError(f'{what}: {first_line(e)}') from None


def read_lines(path, why):
    """The lines of a text file that are not empty. Raises ValueError."""
    with explained(f'{why}; {path!r} cannot be read'), open(path, encoding='utf-8') as f:
        lines = [line.strip() for line in f if line.strip()]
    if not lines:
        raise ValueError(f'{why}; {path} is empty')
    return lines


def check_folder(path, need=0):
    """Raises ValueError unless a folder is or can be made and has room for `need` bytes. Leaves nothing behind."""
    with explained(f'results cannot be written to {path!r}'):
        parent = os.path.abspath(path)
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        with tempfile.TemporaryFile(dir=parent):                               # of no name: a kill leaves nothing
            pass
        longest = os.path.join(path, 64 * '_')
        for name in [longest, *os.path.relpath(path, parent).split(os.sep)]:   # relpath: not of ''
            with contextlib.suppress(FileNotFoundError):
                os.lstat(os.path.join(parent, name))                           # too long, or with a zero byte
        free = shutil.disk_usage(parent).free
    if need > free:
        raise ValueError(f'{path} has room for {free / 2 ** 20:,.0f} MB, a checkpoint needs {need / 2 ** 20:,.0f} MB')


def write_atomically(path, write):
    """`write(temporary path)`, then rename: nobody sees half a file, and a failed write leaves nothing."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    tmp = os.path.join(folder, '.tmp-' + name)
    try:
        write(tmp)
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def save_model(net, path, diffusion=None, **more):
    """A self-describing safetensors file: the weights, if they are finite, and as JSON in the header `net.config`,
    `diffusion.config` and what more there is: `vae`, the pipeline that decodes a denoiser's latents, `pipeline`, the
    one with the texts and the scheduler of a network of diffusers, and `guided`, that its predictions are guided."""
    if odd := not_finite(net.state_dict()):
        die(f'{path} is not saved, its {odd} is not finite: a smaller --lr')
    more = {'diffusion': diffusion and diffusion.config} | more
    write_tensors(net.state_dict(), path, {'net': net.config} | {k: v for k, v in more.items() if v})


def write_tensors(tensors, path, header):
    """A safetensors file with a dict as JSON in its header, which `read_weights` reads."""
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {'config': json.dumps(header)})
    write_atomically(path, lambda tmp: pathlib.Path(tmp).write_bytes(data))    # save_file's are nobody else's to read


def not_finite(state):
    """The name of the first tensor of a state dict that holds nan or inf; '' where none does."""
    return next((k for k, v in state.items() if v.is_floating_point() and (~v.isfinite()).any()), '')


def free_memory(device):
    """Bytes: what is free on a GPU, or this rank's share of the machine's."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def make(kind=None, /, **kw):
    """The network, of ours or of diffusers (as a Pipeline), or the Diffusion, of keywords; a `net.config` has its kind,
    'class', among them. Raises ValueError, for sizes without sense or beyond the machine's memory before any is taken.
    """
    kind = kind or kw.pop('class', None)
    with explained(f'no {kind} of ' + ', '.join(f'{k}={v!r}'[:60] for k, v in kw.items())[:500]):
        if kind in DIFFUSERS:                                                  # others may run what they find
            import diffusers
            kw.pop('image_size', None)

            def make_it(**kw):
                return Pipeline(getattr(diffusers, kind)(**kw))
        else:
            make_it = {'UNet': UNet, 'DiT': DiT, 'LVAE': LVAE, 'classifier': classifier, 'Diffusion': Diffusion}[kind]
        for k, value in kw.items():
            values = tree_leaves(value)
            low, high = 1 if k == 'image_size' else -1, 2 ** 20
            if 'layers' in k or k in ('depth', 'num_res_blocks'):              # every one of them is made, even on meta
                high = 16 if 'per_block' in k else 200
            if kind in DIFFUSERS and len(values) > 20 or any(
                    type(v) in (int, float) and not low <= v <= high for v in values):
                raise ValueError(f'{k}={str(value)[:60]} is out of range')
        if kind != 'Diffusion':
            with torch.device('meta'):
                net = make_it(**kw)
                sizes = [p.numel() for p in [*net.parameters(), *net.buffers()]]
            if min(sizes) == 0 or 4 * sum(sizes) > free_memory(torch.device('cpu')):
                raise ValueError(f'{sum(sizes):,} parameters' + ' do not fit into memory' * (min(sizes) > 0))
        return make_it(**kw)


def read_weights(path):
    """(state dict, header dict) of a .safetensors or a torch file. Code in a file is never run. Raises ValueError for a
    file that is missing, cut short or something else."""
    if not os.path.isfile(path):
        raise ValueError(f'no file {path}')
    try:
        if path.endswith('.safetensors'):
            with safe_open(path, 'pt') as f:
                header = json.loads((f.metadata() or {}).get('config', '{}'))
                kinds = dict(net=dict, diffusion=dict, vae=str, pipeline=str)
                if any(not isinstance(header.get(k, kind()), kind) for k, kind in kinds.items()):
                    raise ValueError('its header is damaged')
                return {k: f.get_tensor(k) for k in f.keys()}, header
        state = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f'it holds a {type(state).__name__}, not a dict of tensors')
        return state, {}
    except Exception as e:
        if 'weights_only' in str(e) or 'Unsupported global' in str(e):
            raise ValueError(f'{path} holds more than tensors, and loading that would run its code: where you trust '
                             "it, save its state_dict alone, torch.save(checkpoint['state_dict'], ...)") from None
        raise ValueError(f'{path} cannot be read, it may be cut short or no checkpoint: {first_line(e)}') from None


def class_in(path):
    """The class of the network that a file of ours holds; '' for all other files."""
    try:
        with safe_open(path, 'pt') as f:
            return json.loads(f.metadata()['config'])['net']['class']
    except Exception:                                                          # whoever loads it says what is wrong
        return ''


def digest(what):
    """Eight hexadecimal digits that name a network's weights, or all tensors and numbers in a dict."""
    data = hashlib.sha256()
    for v in tree_leaves(what.state_dict() if isinstance(what, nn.Module) else what):
        tensor = isinstance(v, torch.Tensor)
        data.update(v.detach().cpu().flatten().view(torch.uint8).numpy() if tensor else repr(v).encode())
    return data.hexdigest()[:8]


def tensors_in(state, path, *names):
    """The state dict of a torch file: what it keeps under one of the names, or else itself. Raises ValueError."""
    state = next((state[n] for n in names if isinstance(state.get(n), dict)), state)
    odd = [k for k, v in state.items() if not isinstance(k, str) or not torch.is_tensor(v)]
    if odd or not state:
        raise ValueError(f'{path} holds no dict of tensors, but ' + (repr(odd[0]) if odd else 'nothing'))
    return state


def refuse(known, spec):
    if known:
        raise ValueError(f"{spec} says itself what it is: {', '.join(known)} would do nothing, leave it out")


def load_state(net, state, path):
    """load_state_dict(strict=True), its failure as one line; so are weights that are not finite."""
    try:
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=True)
    except (RuntimeError, AttributeError) as e:
        ours, theirs = net.state_dict(), state
        odd = [k for k in [*ours, *theirs] if k not in ours or k not in theirs or ours[k].shape != theirs[k].shape]
        detail = f'{len(odd)} parameters differ, the first is {odd[0]}' if odd else first_line(e)
        raise ValueError(f"{path} does not fit a {net.config['class']}: {detail}") from None
    if odd := not_finite(net.state_dict()):
        raise ValueError(f'{path}: its {odd} is not finite')
    return net


# ---- diffusers ----
class Shared(dict):
    """Tensors that belong to a network and all its copies: neither parameters nor buffers, so that no EMA copies and no
    DistributedDataParallel sends them."""

    def __deepcopy__(self, memo):
        return self


class Pipeline(nn.Module):
    """A network of diffusers behind the interface of ours: x (B, C, H, W) of latents or pixels, t (B,), y (B,).
    `condition` is '', 'class' or 'text'; y indexes the classes, the last of which is the null condition, or the texts
    given to `set_prompts`, and -1 is the null condition. `source` is where its pipeline is to be had, `pipe` the
    pipeline itself where it is loaded already; `shared` holds the texts embedded, 'prompts' (N, L, D) and perhaps
    'pooled' (N, D). Raises ValueError for a network that is not supported."""

    def __init__(self, net, pipe=None):
        super().__init__()
        kind, c = type(net).__name__, getattr(net, 'config', {})
        if kind not in DIFFUSERS or any(c.get(k) not in (None, known) for k, known in (
                ('class_embed_type', None), ('addition_embed_type', 'text'), ('encoder_hid_dim_type', 'text_proj'))):
            raise ValueError(f'this {kind} is not supported; UNet2DModel, UNet2DConditionModel (with a text encoder), '
                             'DiTTransformer2DModel and SD3Transformer2DModel are')
        if not isinstance(c.sample_size, int):
            raise ValueError(f'sample_size={c.sample_size!r} of a {kind} must be one number')
        takes = inspect.signature(net.forward).parameters
        self.net, self.pipe, self.source, self.shared = net, pipe, '', Shared()
        self.register_buffer('times', None, persistent=False)                  # t as the network wants it, or None
        for m in net.modules():                                                # DiT's drops labels in train mode
            if type(m).__name__ == 'LabelEmbedding':                           # ... in each layer others
                m.dropout_prob = 0.
        self.num_classes = c.get('num_embeds_ada_norm') or max(0, (c.get('num_class_embeds') or 0) - 1)
        self.condition = 'text' if 'encoder_hidden_states' in takes else 'class' if self.num_classes else ''
        self.config = {k: v for k, v in c.items() if not k.startswith('_')} | {
            'class': kind, 'image_size': c.sample_size, 'out_channels': c.get('out_channels') or c.in_channels}

    def set_prompts(self, prompts, cache=''):
        """Embeds the texts by all of the pipeline's text encoders, which are then let go, or finds them in the file
        `cache`, where `keep_prompts` left them. Raises ValueError."""
        given = dict(unet=self.net, transformer=self.net, vae=None)            # only the text encoders are wanted
        self.pipe = self.pipe or open_pipeline(self.source, self.net.dtype, **given)[0]
        encoders = [e for i in ('', '_2', '_3') if (e := getattr(self.pipe, f'text_encoder{i}', None)) is not None]
        with one_first():
            key = hashlib.sha256(repr(([digest(e) for e in encoders], prompts)).encode()).hexdigest()
            found, header = read_weights(cache) if os.path.isfile(cache) else ({}, {})
            if header.get('key') != key:
                for e in encoders:
                    e.to(self.net.device)
                found = self.embed([*prompts, ''])                             # the last one, -1, is the null condition
        self.shared |= {k: v.to(self.net.device, self.net.dtype) for k, v in found.items()}
        self.num_classes, self.pipe, self.key = len(prompts), None, '' if header.get('key') == key else key
        side, t = self.config['image_size'], torch.zeros(1, dtype=torch.long, device=self.net.device)
        with explained('the texts do not fit the network'), torch.no_grad():
            self(torch.zeros(1, self.config['in_channels'], side, side, device=t.device), t, t)

    def keep_prompts(self, cache):
        """Writes the embedded texts to a file, unless they are from there; for one rank, once its folder is made."""
        if self.key:
            write_tensors(self.shared, cache, {'key': self.key})

    @torch.no_grad()
    def embed(self, texts):
        """{'prompts': (N, L, D)} of N texts, with 'pooled' (N, D) where the network takes that too; on the CPU."""
        parts, encode = [], self.pipe.encode_prompt
        kw = dict(device=self.net.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        kw |= dict.fromkeys({'prompt_2', 'prompt_3'} & inspect.signature(encode).parameters.keys())   # as the first
        for i in range(0, len(texts), 256):
            out = encode(prompt=texts[i:i + 256], **kw)[::2]                   # without the negative ones
            parts.append([o.cpu() for o in out])
        return {name: torch.cat(rows) for name, rows in zip(('prompts', 'pooled'), zip(*parts))}

    def forward(self, x, t, y=None):
        y, kw = torch.full_like(t, -1) if y is None else y, {}
        if self.condition == 'class':
            kw = {'class_labels': torch.where(y < 0, self.num_classes, y)}
        elif self.condition == 'text':
            names = {'prompts': 'encoder_hidden_states', 'pooled': 'pooled_projections'}
            kw = {names[k]: v[y].to(self.net.dtype) for k, v in self.shared.items()}
        t = t if self.times is None else self.times[t]
        return self.net(x.to(self.net.dtype), timestep=t, **kw).sample.float()


def has_vae(net):
    """Whether a network has the VAE of its latents: in its __dict__, so not among its parameters nor saved with it."""
    return getattr(net, 'vae', None) is not None


def decode(net, z):
    """A network's latents (B, C, h, w) as images (B, 3, H, W) in [-1, 1], by the VAE that belongs to it, four at a
    time; pixels stay."""
    if not has_vae(net):
        return z
    vae = net.vae.to(z.device)
    z = z.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get('shift_factor') or 0)
    return torch.cat([vae.decode(part).sample.float() for part in z.split(4)])


def read_pipeline(spec):
    """(folder, model_index.json as a dict) of a diffusers pipeline, local or on the hub. Raises ValueError."""
    import huggingface_hub
    from diffusers.utils.logging import disable_progress_bar
    disable_progress_bar()
    logging.disable(logging.ERROR)                                             # what goes wrong is said in one line
    path = os.path.join(spec, 'model_index.json')
    try:
        with one_first():
            path = path if os.path.isdir(spec) else huggingface_hub.hf_hub_download(spec, 'model_index.json')
        with open(path) as f:
            parts = json.load(f)
        # diffusers runs the code in a folder: its newer versions only if asked to, the older ones always
        code = [f for name in ('*/*.py', 'None.py') for f in glob.glob(f'{glob.escape(spec)}/{name}')] + [
            v[0] for k, v in parts.items()
            if isinstance(v, list) and k not in UNUSED and v[0] not in (None, 'diffusers', 'transformers')]
        if any(not k.isidentifier() or isinstance(v, list) and len(v) != 2 for k, v in parts.items()):
            raise ValueError('its model_index.json is damaged')
        if code:
            raise ValueError(f'{code[0]} is code of its own, which is not run')
        return os.path.dirname(path), parts
    except huggingface_hub.errors.GatedRepoError:
        raise ValueError(f'{spec} is gated: accept its terms on huggingface.co/{spec} and log in with '
                         '`hf auth login`') from None
    except Exception as e:
        raise ValueError(f'no diffusers pipeline at {spec}, neither a folder with model_index.json nor a hub id that '
                         f'can be reached: {first_line(e)}') from None


def open_pipeline(spec, dtype, **given):
    """(the pipeline, its model_index.json) of a folder or hub id; parts that are `given` are not loaded."""
    _, parts = read_pipeline(spec)
    from diffusers import DiffusionPipeline
    kw = {k: v for k, v in (dict.fromkeys(UNUSED) | given).items() if k in parts} | {'low_cpu_mem_usage': False}
    if 'text_encoder' in parts and importlib.util.find_spec('transformers') is None:
        raise ValueError(f'{spec} has a text encoder, which needs the package transformers: pip install transformers')
    with explained(f"{spec}: its {parts.get('_class_name')} cannot be loaded"), one_first():
        try:
            pipe = DiffusionPipeline.from_pretrained(spec, **kw)
        except (OSError, ValueError) as e:                                     # there may only be half precision
            try:
                pipe = DiffusionPipeline.from_pretrained(spec, variant='fp16', **kw)
            except (OSError, ValueError):
                raise e from None
            print(f"{spec}: weights in float16, computed in {str(dtype).removeprefix('torch.')}")
        return pipe.to(dtype), parts


def load_part(spec, *names):
    """The first of a pipeline's parts, VAE or scheduler, that it has. Raises ValueError."""
    import diffusers
    root, parts = read_pipeline(spec)
    name = next((n for n in names if parts.get(n, [None])[0]), None)
    with explained(f"{spec}: its {name or ' or '.join(names)} cannot be loaded"), one_first():
        kind, wanted = parts[name][1], 'scheduler' if name == 'scheduler' else 'VAE'
        if not re.match('.*Scheduler$' if wanted == 'scheduler' else 'Autoencoder|VQModel', kind):
            raise ValueError(f'{kind} is no {wanted} of diffusers')
        return getattr(diffusers, kind).from_pretrained(root if os.path.isdir(spec) else spec, subfolder=name,
                                                        low_cpu_mem_usage=False)


# ---- denoisers ----
def make_student(settings, C, H, num_classes, teacher=None, device='cpu'):
    """The student of images (C, H, H) that the settings of dkdm.py describe, of random weights: a UNet, a DiT, or of
    the diffusers class and config in the file `student`, with the texts of the teacher. Raises ValueError."""
    student = settings['student']
    if student in ('unet', 'dit'):
        kind, outputs = (UNet, {'out_channels': C * (1 + settings['learn_sigma'])}) if student == 'unet' else (DiT, {})
        said = {k: settings[k] for k in inspect.signature(kind).parameters if k in settings} | outputs
        return make(kind.__name__, **said | dict(image_size=H, in_channels=C, num_classes=num_classes))
    with explained(f'{student=}: no unet, no dit, no config of a diffusers model for {C}x{H}x{H}'), open(student) as f:
        said = json.load(f)
        if said['_class_name'] not in DIFFUSERS:
            raise ValueError(f"{said['_class_name']!r} is none of " + ', '.join(DIFFUSERS))
        net = make(said['_class_name'], **{k: v for k, v in said.items() if not k.startswith('_')})
        want = getattr(teacher, 'condition', 'class' if num_classes else '')
        if net.condition != want or want == 'class' and net.num_classes != num_classes:
            raise ValueError(f"it takes {net.num_classes or ''} {net.condition or 'no condition'}, the teacher "
                             f"{num_classes or ''} {want or 'none'} (classes: one more in num_class_embeds, for none)")
        net.num_classes = num_classes
        if isinstance(teacher, Pipeline):
            net.shared, net.times = teacher.shared, teacher.times
        t = torch.zeros(1, dtype=torch.long, device=device)
        with torch.no_grad():
            out = net.to(device)(torch.zeros(1, C, H, H, device=device), t, t if num_classes else None)
        if out.shape not in ((1, C, H, H), (1, 2 * C, H, H)) or net.config['image_size'] != H:
            raise ValueError(f"of sample_size {net.config['image_size']} it makes {tuple(out.shape[1:])}")
    return net


def load_denoiser(spec, dtype=torch.float32, **known):
    """(net, diffusion) from one string: a file of ours (.safetensors); an original ADM, DDPM-IP, DKDM, LDM or DiT
    checkpoint (.pt, .ckpt, .safetensors), whose architecture is read off its shapes; or a diffusers folder or hub id. A
    file of ours may name a pipeline, from which it has its VAE and its text encoders.

    dtype: of a pipeline's weights (`pick_dtype`); ours are float32. `cast_frozen` casts them for a teacher.
    known: what an original checkpoint does not say, where the defaults are not right: image_size; num_head_channels
    (32) or num_heads, use_new_attention_order (ADM: True, LDM: False); num_heads of a DiT; schedule ('cosine' for
    ADM, 'linear' for DiT, the checkpoint's own betas for LDM), steps, beta_range, prediction ('eps'), clip (pixels
    True, latents False). The network is in eval mode and frozen. Raises ValueError.
    """
    hub_id = spec.count('/') == 1 and not spec.endswith(WEIGHTS) and not os.path.exists(spec)
    state, header = (None, {}) if os.path.isdir(spec) or hub_id else read_weights(spec)
    refuse(known if header or state is None else (), spec)
    if state is None:
        net, diffusion = load_pipeline(spec, dtype)
    elif not header:
        net, diffusion = load_original(spec, state, known)
    elif 'diffusion' not in header or 'net' not in header:
        raise ValueError(f"{spec} is no denoiser, it holds a {header.get('net', {}).get('class', 'model')}")
    else:
        net, diffusion = make(**header['net']), make('Diffusion', **header['diffusion'])
        load_state(net, state, spec)
        net.guided = header.get('guided', False)                               # needs no guidance any more
        net.source = header.get('pipeline') or header.get('vae', '')
        with explained(f"{spec} needs its teacher's pipeline"):
            if header.get('vae'):
                net.__dict__['vae'] = load_part(header['vae'], 'vae', 'vqvae')
            if isinstance(net, Pipeline):
                net.to(dtype)
                if net.condition == 'text':
                    read_pipeline(net.source)                                  # what set_prompts needs
    if isinstance(net, Pipeline) and diffusion.config['schedule'] == 'flow':
        net.times = (diffusion.b[:-1] * diffusion.T).float()                   # what SD3 calls t
    if has_vae(net):
        net.vae.eval().requires_grad_(False)
    return net.eval().requires_grad_(False), diffusion


def load_pipeline(spec, dtype):
    """A diffusers folder or hub id, with the process that its scheduler states. Nothing is guessed."""
    pipe, parts = open_pipeline(spec, dtype)
    with explained(spec):
        scheduler, process, name = pipe.scheduler, pipe.scheduler.config, type(pipe.scheduler).__name__
        network = getattr(pipe, 'unet', None) or getattr(pipe, 'transformer', None)
        net = Pipeline(network, pipe if 'text_encoder' in parts else None)
        if net.config.get('num_class_embeds') is not None:
            raise ValueError(f'what the classes of a {type(network).__name__} mean is not known')
        net.source = os.path.abspath(spec) if os.path.isdir(spec) else spec
        net.guided = parts.get('_guided', False)                               # a student of ours: no guidance any more
        net.__dict__['vae'] = getattr(pipe, 'vae', None) or getattr(pipe, 'vqvae', None)
        bent = ('use_dynamic_shifting', 'shift_terminal', 'invert_sigmas', 'use_karras_sigmas',
                'use_exponential_sigmas', 'use_beta_sigmas')
        if name == 'FlowMatchEulerDiscreteScheduler' and not any(process.get(k) for k in bent):
            return net, Diffusion('flow', process.num_train_timesteps, 'flow', False, clip=False, shift=process.shift)
        prediction = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x0'}.get(process.get('prediction_type'))
        scaled = process.get('thresholding')                                   # DeepFloyd IF's clamp scales x_0 first
        if prediction is None or not hasattr(scheduler, 'betas') or scaled and type(pipe).__name__ != 'IFPipeline':
            raise ValueError(f'its {name} is not a process x_t = a x_0 + b eps with a list of betas and a stated '
                             'prediction_type, without thresholding, nor flow matching with a fixed shift')
        return net, Diffusion(scheduler.betas.tolist(), prediction=prediction,
                              clip=bool(process.get('clip_sample') or scaled),
                              learn_sigma=net.config['out_channels'] == 2 * net.config['in_channels'])


def load_original(spec, state, known):
    """An original checkpoint, its architecture read off its shapes: of an ADM or LDM U-Net all but the sizes of images
    and of heads. LDM keeps the network, its EMA and the autoencoder in one dict; DiT its EMA beside the weights."""
    def count(prefix):
        return 1 + max(int(k.split('.')[1]) for k in state if k.startswith(prefix))
    state = tensors_in(state, spec, 'ema', 'state_dict')
    betas = state.get('betas')
    names = [k.removeprefix('model.') for k in state if k.startswith('model.diffusion_model.')]
    if names:
        state = {k.removeprefix('diffusion_model.'): state.get('model_ema.' + k.replace('.', ''), state['model.' + k])
                 for k in names}
    told = {k: known.pop(k) for k in ('schedule', 'steps', 'beta_range', 'prediction', 'clip') if k in known}
    with explained(f'{spec} is no denoiser that this code knows'):
        if 'x_embedder.proj.weight' in state:
            hidden, channels, patch, _ = state['x_embedder.proj.weight'].shape
            learn_sigma = len(state['final_layer.linear.bias']) == 2 * channels * patch ** 2
            net = make('DiT', **dict(
                image_size=patch * math.isqrt(state['pos_embed'].shape[1]), patch_size=patch, in_channels=channels,
                hidden_size=hidden, num_heads=hidden // (72 if hidden == 1152 else 64), depth=count('blocks.'),
                mlp_ratio=state['blocks.0.mlp.fc1.weight'].shape[0] / hidden, learn_sigma=learn_sigma,
                num_classes=len(state.get('y_embedder.embedding_table.weight', [0])) - 1) | known)
            process = dict(schedule='linear', learn_sigma=learn_sigma, clip=False)
        elif 'input_blocks.0.0.weight' in state:
            outputs, width = count('output_blocks.'), state['time_embed.0.weight'].shape[1]
            # the first output block that also upsamples ends a level of `blocks` + 1
            ups = [int(k.split('.')[1]) for k in state if k.startswith('output_blocks.') and k.split('.')[2] != '0'
                   and k.endswith(('.in_layers.0.weight', '.conv.weight'))]
            blocks = min(ups, default=outputs - 1)
            tops = [f'input_blocks.{1 + level * (blocks + 1)}' for level in range(outputs // (blocks + 1))]
            mults = [state[f'{k}.0.out_layers.3.weight'].shape[0] / width for k in tops]
            updown = f'input_blocks.{blocks + 1}.0.op.weight' not in state
            latent = not updown and betas is not None
            size = known.setdefault('image_size', 64 if latent else 32)
            net = make('UNet', **dict(
                in_channels=state['input_blocks.0.0.weight'].shape[1], out_channels=len(state['out.2.bias']),
                model_channels=width, num_res_blocks=blocks, resblock_updown=updown,
                channel_mult=tuple(int(m) if m == int(m) else m for m in mults),
                attention_resolutions=tuple(size // 2 ** i for i, k in enumerate(tops) if f'{k}.1.qkv.weight' in state),
                use_scale_shift_norm=len(state[f'{tops[0]}.0.emb_layers.1.bias']) == 2 * width * mults[0],
                use_new_attention_order=not latent, num_classes=len(state.get('label_emb.weight', ()))) | known)
            process = dict(schedule=betas.tolist() if latent else 'cosine', clip=not latent,
                           learn_sigma=net.config['out_channels'] == 2 * net.config['in_channels'])
        else:
            raise ValueError('no keys of a U-Net (input_blocks...) or DiT (x_embedder...) in it')
    return load_state(net, state, spec), make('Diffusion', **process | told)


# ---- classifiers ----
def load_classifier(spec, **known):
    """A frozen classifier in eval mode: a file of ours; a state dict (.th, .pt, .pth) of a ResNet, Wide ResNet or VGG
    as people publish them, keys with or without `module.`; or torchvision:NAME with its ImageNet weights (downloaded).
    known: image_size, mean, std (of images in [0, 1]) of a state dict, where its family's usual ones are not right: 32
    pixels, and ImageNet's mean and deviation for CIFAR ResNets of depth 6n+2, CIFAR-10's for the others; 224 pixels
    and ImageNet's for torchvision's. Raises ValueError."""
    if spec.startswith('torchvision:'):
        from torchvision.models import get_model_weights
        refuse(known.keys() - {'image_size', 'mean', 'std'}, spec)
        with explained(f'{spec} is not to be had'):
            weights = get_model_weights(spec.partition(':')[2]).DEFAULT
            usual = weights.transforms()
            usual = dict(image_size=usual.crop_size[0], mean=usual.mean, std=usual.std)
            net = classifier(spec, len(weights.meta['categories']), **usual | known, weights=weights)
        del net.config['weights']
        return net.eval().requires_grad_(False)
    state, header = read_weights(spec)
    if header.get('net', {}).get('class') == 'classifier':
        refuse(known, spec)
        return load_state(make(**header['net']), state, spec).eval().requires_grad_(False)
    with explained(f'{spec} is no classifier that this code knows'):
        if header:
            raise ValueError(f"it holds a {header.get('net', {}).get('class', 'model')}")
        state = {k.removeprefix('module.'): v for k, v in tensors_in(state, spec, 'state_dict').items()}
        if not any(f'{k}.weight' in state for k in ('layer1.0.conv1', 'block1.layer.0.conv1', 'block4.0')):
            raise ValueError('no keys of a ResNet (layer1...), Wide ResNet (block1.layer...) or VGG (block0...) in it')
        blocks = sum(k.endswith('.conv1.weight') for k in state)
        first, head = ('block0.0', 'classifier') if 'block4.0.weight' in state else (
            'conv1', 'fc' if 'fc.bias' in state else 'linear')
        width, channels, kernel, _ = state[f'{first}.weight'].shape
        usual = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))              # CIFAR-10's
        imagenet = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        if 'block1.layer.0.conv1.weight' in state:
            usual |= dict(name=f"wrn{2 * blocks + 4}_{state['fc.weight'].shape[1] // 64}")
        elif 'block4.0.weight' in state:
            usual |= dict(name=f'vgg{sum(v.dim() == 4 for v in state.values()) + 3}')
        elif 'layer4.0.conv1.weight' in state:
            depth = {8: 18, 16: 50 if 'layer1.0.conv3.weight' in state else 34}.get(blocks)
            usual |= dict(name=f'resnet{depth}', width=width) if kernel != 7 else imagenet | dict(
                name=f'torchvision:resnet{depth}', image_size=224)
        else:
            shortcut = 'conv' if 'layer2.0.downsample.0.weight' in state else 'pad'
            usual |= imagenet | dict(name=f'resnet{2 * blocks + 2}', width=width, shortcut=shortcut)
        net = make('classifier', **dict(num_classes=len(state[f'{head}.bias']), in_channels=channels) | usual | known)
    if isinstance(net, Torchvision):
        state = {f'net.{k}': v for k, v in state.items()}
    elif net.head_name == 'fc':
        state = {k.replace('linear.', 'fc.'): v for k, v in state.items()}
    elif net.head_name == 'linear':                                            # timm's names
        state = {re.sub('^fc[.]', 'linear.', k).replace('.downsample.', '.shortcut.'): v for k, v in state.items()}
    return load_state(net, state, spec).eval().requires_grad_(False)


# ---- VAEs ----
class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL or AutoencoderTiny behind the interface of LVAE: images in [0, 1], one level, no noise
    of its own where the class has no posterior (std 0)."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.config = {k: v for k, v in net.config.items() if not k.startswith('_')} | {'class': type(net).__name__}

    def encode(self, x):
        """[(mean, std)] of the latents (B, C, h, w). Raises ValueError for other channels or values outside [0, 1]."""
        check_images(x, self.config)
        found = self.net.encode(x * 2 - 1)
        if hasattr(found, 'latent_dist'):
            return [(found.latent_dist.mean.float(), found.latent_dist.std.float())]
        return [(found.latents.float(), torch.zeros_like(found.latents.float()))]

    def decode(self, noise, seen):
        """(out (B, C, H, W), q, p) of latents mean + std noise."""
        (mean, std), = seen
        out = (self.net.decode(mean + std * noise[0]).sample.float() + 1) / 2
        return out, seen, [(torch.zeros_like(mean), torch.ones_like(std))]

    def forward(self, x, noise):
        return self.decode(noise, self.encode(x))


def load_vae(spec):
    """A frozen VAE in eval mode: an LVAE of ours (.safetensors), or diffusers' AutoencoderKL or AutoencoderTiny as a
    folder or hub id, of its own or as a pipeline's. Its `encode` and `decode` are LVAE's. Raises ValueError."""
    if spec.endswith(WEIGHTS):
        state, header = read_weights(spec)
        kind = header.get('net', {}).get('class', 'model without a description')
        if kind != 'LVAE':
            raise ValueError(f'{spec} is no VAE of ours, it holds a {kind}')
        return load_state(make(**header['net']), state, spec).eval().requires_grad_(False)
    import diffusers
    try:
        net = load_part(spec, 'vae')
    except ValueError as e:                                                    # no pipeline: a VAE of its own
        try:
            with one_first(), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                kind = diffusers.AutoencoderKL.load_config(spec)['_class_name']
                kind = kind if kind.startswith('Autoencoder') else None        # any other class may run what it finds
                net = getattr(diffusers, kind).from_pretrained(spec, low_cpu_mem_usage=False)
        except Exception:
            raise ValueError(f'no VAE at {spec}, neither a file of ours nor a folder or hub id of diffusers: '
                             f'{e}') from None
    if type(net).__name__ not in ('AutoencoderKL', 'AutoencoderTiny'):
        raise ValueError(f'{spec} is a {type(net).__name__}; AutoencoderKL and AutoencoderTiny are supported')
    return Autoencoder(net.float()).eval().requires_grad_(False)


# ---- images ----
def load_images(spec, train=True, image_size=0):
    """(images uint8 (N, C, H, W), labels int64 (N,) or None) from one string.

    An ADM-style .npz (`arr_0` uint8 NHWC, `arr_1` labels); a folder of such shards, or of such folders; a folder of
    images, in one subfolder per class or none, or Tiny-ImageNet's `val`; a .txt of lines `file label`, the files
    relative to its folder (the lists of DomainNet); or a torchvision dataset (mnist, cifar10, svhn, celeba, ...),
    downloaded to ./data; `train` picks its split. With `:a-b` at its end, only the classes a to b. image_size: the
    middle of every image is resized to it. Raises ValueError.
    """
    classes, match = None, re.fullmatch(r'(.+):(\d+)-(\d+)', spec)
    if match:
        spec, classes = match[1], range(int(match[2]), int(match[3]) + 1)
        if not classes:
            raise ValueError(f'{spec}:{match[2]}-{match[3]}: the classes from a to b, a not above b')
    shards = [spec] if spec.endswith('.npz') else []
    if os.path.isdir(spec):
        shards = sorted(glob.glob(os.path.join(glob.escape(spec), '**', '*.npz'), recursive=True))
    if shards:
        parts = [load_npz(f) for f in shards]
        if len({p[0].shape[1:] for p in parts}) > 1 or len({p[1] is None for p in parts}) > 1:
            raise ValueError(f'{spec}: its shards differ in image size, channels or labels')
        images, labels = (None if part[0] is None else torch.cat(part) for part in zip(*parts))
    else:                                                                      # grey ones stored as RGB stay RGB
        from torchvision.transforms.functional import pil_to_tensor
        pairs = [(resize_images(pil_to_tensor(image)[None], image_size), label)
                 for image, label in open_images(spec, train, classes)]
        if not pairs:
            raise ValueError(f'no images in {spec}')
        images, labels = zip(*pairs)
        if len({i.shape for i in images}) > 1:
            raise ValueError(f'{spec}: its images differ in size ({tuple(images[0].shape[2:])} and others); resize '
                             'them first, where there is a key image_size by it')
        images, labels = torch.cat(images), torch.tensor(labels) if isinstance(labels[0], int) else None
    if classes and labels is None:
        raise ValueError(f'{spec} has no labels to choose classes {classes[0]} to {classes[-1]} by')
    if classes:
        chosen = (labels >= classes[0]) & (labels <= classes[-1])
        if not chosen.any():
            raise ValueError(f'{spec} has no images of the classes {classes[0]} to {classes[-1]}')
        images, labels = images[chosen], labels[chosen]
    return torch.cat([resize_images(i, image_size) for i in images.split(500)]) if image_size else images, labels


def read_npz(path):
    """All arrays of an .npz, none of them unpickled. Raises ValueError."""
    with explained(f'{path} cannot be read'), np.load(path) as z:
        return dict(z)


def load_npz(path):
    arrays = read_npz(path)
    if 'arr_0' not in arrays:
        raise ValueError(f"{path} has no 'arr_0' (uint8, N x H x W x C), only {', '.join(arrays) or 'nothing'}")
    images, labels = arrays['arr_0'], arrays.get('arr_1')
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(f"{path}: 'arr_0' must be uint8, N x H x W x C; it is {images.dtype}, {images.shape}")
    if labels is not None:
        if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu' or labels.astype(np.int64).min() < 0:
            raise ValueError(f"{path}: 'arr_1' must be {len(images)} labels from 0, not {labels.dtype}, {labels.shape}")
        labels = torch.from_numpy(labels.astype(np.int64))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def open_images(spec, train, classes):
    """Pairs (PIL image, label or None) of files in a folder or list, or of a torchvision dataset."""
    from torchvision import datasets
    names, notes = {n.lower(): n for n in datasets.__all__}, os.path.join(spec, 'val_annotations.txt')
    if not os.path.isdir(spec) and not spec.endswith('.txt'):
        if spec.lower() not in names:
            raise ValueError(f'no images at {spec!r}: an .npz, a folder, or a torchvision dataset such as mnist or '
                             'cifar10')
        with explained(f'{spec} could not be downloaded to data/'), one_first():
            dataset = getattr(datasets, names[spec.lower()])
            named = 'train' in inspect.signature(dataset).parameters
            return dataset('data', download=True, **dict(train=train) if named else dict(
                split='train' if train else 'test'))
    if spec.endswith('.txt'):
        rows = [line.rsplit(' ', 1) for line in read_lines(spec, f'{spec}: a list of images')]
        if any(len(r) < 2 or not r[1].isdecimal() for r in rows):
            raise ValueError(f'{spec}: every line must be a file and a label')
        files = [(os.path.join(os.path.dirname(spec), f), int(y)) for f, y in rows]
    elif os.path.exists(notes):                                                # Tiny-ImageNet's: file, class and box
        rows = [f'{line}\t'.split('\t') for line in read_lines(notes, notes)]
        names = sorted({r[1] for r in rows})                                   # as the folders of `train` are numbered
        files = [(os.path.join(spec, 'images', r[0]), names.index(r[1])) for r in rows]
    else:
        try:
            files = datasets.ImageFolder(spec).samples
        except FileNotFoundError:                                              # no subfolders: images without labels
            names = sorted(f for f in os.listdir(spec) if f.lower().endswith(datasets.folder.IMG_EXTENSIONS))
            files = [(os.path.join(spec, f), None) for f in names]

    def load(f):
        with explained(f'{f} is no image that can be read'):                   # PIL's errors do not all name the file
            return datasets.folder.default_loader(f)
    return ((load(f), y) for f, y in files if classes is None or y in classes)


def resize_images(images, size):
    """uint8 images (N, C, H, W): the square in their middle, `size` a side; as they are where size is 0."""
    H, W = images.shape[2:]
    if size == 0 or size == H == W:
        return images
    side = min(H, W)
    return to_uint8(resize(to_float(images[:, :, (H - side) // 2:, (W - side) // 2:][:, :, :side, :side]), size))


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(path, sets, columns):
    """A PNG of sets of images (B, C, H, W) in [-1, 1], a row of `columns` of each in turn; small ones are enlarged to
    about 64 pixels."""
    from torchvision.utils import save_image
    images = torch.cat([row for rows in zip(*[x.split(columns) for x in sets]) for row in rows])
    images = F.interpolate(images.float().cpu().clamp(-1, 1), scale_factor=float(max(1, 64 // images.shape[-1])))
    write_atomically(path, lambda tmp: save_image((images + 1) / 2, tmp, nrow=columns, padding=4))


# ----------------------------------------------------------------------------------------------------------------
# measuring
# ----------------------------------------------------------------------------------------------------------------

def features(net, images):
    """(what the linear layer of a classifier sees of uint8 images (B, C, H, W): the mean of its last map (B, D); the
    logits)."""
    logits, maps = net.forward_features(preprocess(net, to_float(images)))
    return maps[-1].mean((2, 3)), logits


def load_features(spec, device):
    """(net, space, D): a classifier, the name under which statistics of its features are stored, and how many features
    it has. Raises ValueError."""
    net = load_classifier(spec)
    space, c = f'{os.path.basename(spec)} {digest(net)}', net.config
    net = net.to(device, memory_format=memory_format(device))
    with torch.no_grad():
        blank = torch.zeros(1, c.get('in_channels', 3), c['image_size'], c['image_size'], device=device)
        return net, space, features(net, blank)[0].shape[1]


def read_statistics(path, space, sizes):
    """What eval_fid.py or ADM stored of a set of images: 'mu', 'sigma', perhaps 'mu_s', 'sigma_s' and 'n'; None of a
    file of images. sizes: how many features there are, by the name of their mean. Raises ValueError: of another space,
    or no mean and covariance."""
    arrays = read_npz(path)
    if 'mu' not in arrays:
        return None
    named = str(arrays.get('space', 'inception'))                              # ADM's files do not name theirs
    if named != space:
        raise ValueError(f'{path} holds statistics in the space of {named}, not of {space}: make them again, '
                         'eval_fid.py --save_stats')
    for name, size in sizes.items():
        mu, sigma = (arrays.get(k, np.empty(0)) for k in (name, name.replace('mu', 'sigma')))
        if name != 'mu' and not mu.size and not sigma.size:
            continue
        if mu.shape != (size,) or sigma.shape != (size, size) or mu.dtype.kind != 'f' or sigma.dtype.kind != 'f':
            raise ValueError(f'{path} holds statistics of {mu.size} features, not {size}')
        sigma, top = torch.from_numpy(sigma).double(), np.abs(sigma).max()
        if not np.isfinite(mu).all() or not np.isfinite(top) or (sigma - sigma.T).abs().max() > 1e-4 * top \
                or torch.linalg.eigvalsh(sigma)[0] < -1e-4 * top:
            raise ValueError(f'{path}: its covariance is none, finite, symmetric and positive; eval_fid.py '
                             '--save_stats makes one')
    return {k: torch.from_numpy(arrays[k]).double() for k in ('mu', 'sigma', 'mu_s', 'sigma_s', 'n') if k in arrays}


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, Eq. (6)), and whether the
    product is near singular. It has the eigenvalues of sigma1^(1/2) sigma2 sigma1^(1/2), which is symmetric."""
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ sigma2 @ root)
    distance = ((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2).trace() - 2 * product.clamp(min=0).sqrt().sum()
    return float(distance), bool(product[0] < 1e-14 * product[-1])


# ----------------------------------------------------------------------------------------------------------------
# running
# ----------------------------------------------------------------------------------------------------------------

def start(device='auto', dtype='auto', seed=0):
    """(device, autocast, rank, world) of this process, alone or under torchrun (NCCL on GPUs, gloo on CPUs). autocast
    is a context for the networks' forward passes: bfloat16 or none."""
    try:
        rank, world, local, near = (int(os.environ.get(k, d)) for k, d in (
            ('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0), ('LOCAL_WORLD_SIZE', 1)))
        if not 0 <= rank < world or not 0 <= local < max(near, world) or near < 1:
            raise ValueError(f'rank {rank} of {world}, {local} of {near} here')
    except ValueError as e:
        die(f'RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are as torchrun sets them, or not set: {e}')
    if dtype not in ('auto', 'float32', 'bfloat16'):
        die(f"dtype={dtype}: 'auto', 'float32' or 'bfloat16'")
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(device)
        if device.type == 'cuda':
            device = torch.device('cuda', local if world > 1 or device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        die(f"device={device} is not to be had here: {first_line(e)}; 'auto' takes what there is")
    torch.backends.cudnn.allow_tf32 = False                                    # as in the first convolution: float32
    if world > 1 and not dist.is_initialized():
        # tensors of the CPU travel by gloo, so that asking the other ranks does not wait for the GPU; hours, since one
        # rank may work alone (downloads, pictures, metrics); a restart finds the addresses of dead ranks in the store
        try:
            store, rank, world = next(dist.rendezvous('env://'))
            attempt = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
            dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', store=attempt,
                                    rank=rank, world_size=world, timeout=timedelta(hours=6))
        except (ValueError, RuntimeError) as e:
            die(f'{world} ranks cannot meet, start them by torchrun: {first_line(e)}')
    torch.manual_seed(seed)                                                    # the same weights on every rank
    bf16 = pick_dtype(device, dtype) == torch.bfloat16
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16), rank, world


def share(batch_size, world, grad_accum=1):
    """How many images of a batch one forward pass of one rank has; the script ends where that is no number."""
    if batch_size % (world * grad_accum):
        parts = f'{world} ranks' + f' x {grad_accum} accumulation steps' * (grad_accum > 1)
        die(f'batch_size={batch_size} is shared by {parts}: a multiple of {world * grad_accum}')
    return batch_size // world // grad_accum


def pick_dtype(device, dtype='auto'):
    """What networks compute in: `dtype`, or of 'auto' bfloat16 where the hardware has it, on other GPUs float16 (frozen
    pipelines alone: there is no loss scaling here) and else float32."""
    if dtype != 'auto':
        return getattr(torch, dtype)
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    can = torch.cpu.get_capabilities() if device.type == 'cpu' and hasattr(torch.cpu, 'get_capabilities') else {}
    return torch.bfloat16 if can.get('avx512_bf16') or can.get('amx_bf16') else torch.float32


def cast_frozen(net, dtype):
    """Casts a frozen network of ours once to what autocast would cast it to in every call: its convolutions and linear
    layers, but not the first one, which reads x_t in float32."""
    first = net.input_blocks[0] if isinstance(net, UNet) else net.x_embedder if isinstance(net, DiT) else nn.Identity()
    if dtype == torch.bfloat16 and not isinstance(net, Pipeline):              # those are loaded in it
        for m in set(net.modules()) - set(first.modules()):
            if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                m.to(dtype)
    return net


def memory_format(device):
    """channels_last for the convolutions of GPUs; on CPUs it is the slower one."""
    return torch.channels_last if device.type == 'cuda' else torch.contiguous_format


def largest(value=0):
    """The largest of a number over all ranks, which wait for each other, but not for their GPUs; the number itself
    where there is one rank."""
    if not dist.is_initialized():
        return value
    value = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


@contextlib.contextmanager
def one_first():
    """One rank of each node downloads, the others find the files."""
    waits = dist.is_initialized() and int(os.environ.get('LOCAL_RANK', 0))
    if waits:
        largest()
    try:
        yield
    finally:
        if not waits:
            largest()


def stop_flag():
    """A list that is empty until Ctrl-C or SIGTERM, whose number it then holds: the loop saves before it leaves."""
    flag = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, _: flag.append(number))
    return flag


def leave(stopped_by=0):
    """The end of a script: exit code 0, or after a signal (its number) 130 or 143."""
    code = 128 + int(stopped_by) if stopped_by else 0
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)                                                         # gloo's threads may abort a plain end
    sys.exit(code)


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """ema <- decay ema + (1 - decay) net, with a shorter memory in the first steps: (1 + step) / (10 + step)."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in net.parameters()], 1 - decay)
    for b_ema, b in zip(ema.buffers(), net.buffers()):
        b_ema.copy_(b)


# settings that do not change what a run computes next: the others are part of its checkpoints
MAY_CHANGE = ('init_from', 'out_dir', 'max_steps', 'epochs', 'log_every', 'save_every', 'sampler', 'sample_steps',
              'device', 'compile', 'wandb', 'teacher_source', 'any_teacher')


def fixed(settings):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return {k: v for k, v in settings.items() if k not in MAY_CHANGE} | {'ranks': ranks}


def claim(out_dir, rank):
    """Makes out_dir and keeps other runs out of it until this process ends."""
    import fcntl                                                               # not on Windows
    os.makedirs(out_dir, exist_ok=True)
    taken, lock = False, os.open(os.path.join(out_dir, '.lock'), os.O_RDWR | os.O_CREAT)   # a number: stays open
    if rank == 0:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(lock, 0)
            os.write(lock, f'process {os.getpid()} on {os.uname().nodename}'.encode())
        except OSError as e:                                                   # others: a file system without locks
            taken = isinstance(e, BlockingIOError)
    if largest(taken):
        die(f'{out_dir} belongs to a run that has not ended, {os.read(lock, 99).decode()}: another --out_dir')


def save_checkpoint(settings, step, net, opt, shared, own, rank):
    """What all ranks share (written by rank 0) and what this rank alone has, its random generators among it. A run that
    is killed at any moment finds the last complete set: `ckpt.pt` is renamed into place after all ranks have written,
    and names their step."""
    out_dir = settings['out_dir']
    mine = os.path.join(out_dir, f'ckpt_{step}_rank{rank}.pt')
    shared = {'net': net.state_dict(), 'opt': opt.state_dict(), **shared, 'step': step, 'settings': fixed(settings)}
    number = f'{int(largest(int(digest(shared), 16) if rank == 0 else 0)):08x}'
    cuda = {'cuda': torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    own = own | {'random': {'cpu': torch.get_rng_state()} | cuda, 'of': number}
    write_atomically(mine, lambda tmp: torch.save(own | {'digest': digest(own)}, tmp))
    largest()
    if rank == 0:
        write_atomically(os.path.join(out_dir, 'ckpt.pt'), lambda tmp: torch.save(shared | {'digest': number}, tmp))
    largest()
    for f in os.listdir(out_dir):
        if f.startswith(('ckpt_', '.tmp-ckpt_')) and f.endswith(f'_rank{rank}.pt') and f != os.path.basename(mine):
            os.remove(os.path.join(out_dir, f))


def load_checkpoint(out_dir, rank, settings=None):
    """(shared, own) of the last complete checkpoint. Raises ValueError: damage, another run's files or settings."""
    def part(name):
        found, _ = read_weights(os.path.join(out_dir, name))
        if found.pop('digest', None) != digest(found):
            raise ValueError(f'{out_dir}/{name} is damaged, or of an older version: --init_from=scratch starts again')
        return found

    shared = part('ckpt.pt')
    for k, v in fixed(settings).items() if settings else ():
        if shared['settings'].get(k) != v:
            raise ValueError(f"{out_dir} holds a run with {k}={shared['settings'].get(k)!r}, not {v!r}: that run's "
                             'settings, or another --out_dir')
    own = part(f"ckpt_{shared['step']}_rank{rank}.pt")
    if own['of'] != digest(shared):
        raise ValueError(f'{out_dir}: ckpt.pt and the file of rank {rank} are of different runs')
    return shared, own


def resume(settings, rank, net, need=0):
    """(shared, own) of the checkpoint that a run goes on from, its weights already in `net`; None at its beginning,
    when older ones are removed and `net` has the weights of a file, if `init_from` is one. Claims out_dir, which must
    have room for `need` bytes, so it is the last of the checks. Raises ValueError."""
    out_dir, init_from, teacher = (settings[k] for k in ('out_dir', 'init_from', 'teacher'))
    ours = [os.path.realpath(os.path.join(out_dir, f)) for f in ('student.safetensors', 'best.safetensors', 'student')]
    if os.path.realpath(teacher) in ours:
        raise ValueError(f'teacher={teacher} would be overwritten by its student: another --out_dir')
    if init_from not in ('scratch', 'resume'):
        if not os.path.isfile(init_from):
            raise ValueError(f"init_from={init_from!r}: 'scratch', 'resume' or a file; there is none of this name")
        load_state(net, read_weights(init_from)[0], init_from)
    check_folder(out_dir, need)
    claim(out_dir, rank)
    if init_from != 'resume' and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        for name in ('ckpt.pt', 'ckpt_*_rank*.pt') if rank == 0 else ():       # torchrun --max-restarts counts from 1
            for f in glob.glob(os.path.join(glob.escape(out_dir), name)):
                os.remove(f)
                print(f'{f}, of an earlier run, is removed')
        return None
    found = os.path.exists(os.path.join(out_dir, 'ckpt.pt'))
    if found != largest(found):
        raise ValueError(f'out_dir={out_dir} must be a folder that all ranks share')
    if not found and rank == 0:
        print(f'{out_dir} has no checkpoint yet: from the beginning')
    checkpoint = load_checkpoint(out_dir, rank, settings) if found else None
    if found:
        load_state(net, checkpoint[0]['net'], out_dir)
    return checkpoint


def go_on(checkpoint, opt):
    """The rest of it, right before the loop: the optimiser and this rank's random generators."""
    shared, own = checkpoint
    opt.load_state_dict(shared['opt'])
    state = own.get('random', own)                                             # of an older version: beside the rest
    torch.set_rng_state(state['cpu'])
    if torch.cuda.is_initialized() and 'cuda' in state:                        # else the run began on another device
        torch.cuda.set_rng_state(state['cuda'])
    return shared, own


class Log:
    """`log.csv`, a row per call, `step` first, `seconds` last; a resumed run continues after the checkpoint's step, its
    clock after `seconds`. Rank 0 only."""

    def __init__(self, path, step=0):
        lines = []
        try:
            if step and os.path.exists(path):
                with open(path, newline='') as f:
                    rows = [r for r in f if r.endswith('\n')]
                    lines = rows[:1] + [r for r in rows[1:] if int(r.split(',')[0]) <= step]
            self.seconds = float(lines[-1].split(',')[-1]) if len(lines) > 1 else 0.
        except ValueError as e:
            die(f'{path} is damaged: {first_line(e)}; without it --init_from=resume goes on all the same')
        write_atomically(path, lambda tmp: open(tmp, 'w', newline='').writelines(lines))   # a kill here loses no rows
        self.file = open(path, 'a', newline='')

    def __call__(self, **row):
        writer = csv.writer(self.file)
        if self.file.tell() == 0:
            writer.writerow(row)
        writer.writerow([f'{v:.6g}' if isinstance(v, float) else v for v in row.values()])
        self.file.flush()
