"""
Everything that the scripts share, in two parts.

Part 1, to copy from. It uses nothing from part 2 and imports only math and torch:
    networks     UNet, DiT, DENOISERS; resize, preprocess
    diffusion    Diffusion: the process, its steps and losses; betas_from_alpha_bar
    sampling     guided, sampling_steps, sample
    files        read_safetensors; to_float, to_uint8, with_channels

Part 2, the plumbing:
    files        save_model, read_weights, load_state, make
    the door     adapter, load_from_file: Python files bring what comes from elsewhere
    loaders      load_denoiser, load_classifier, load_vae, load_images
    measuring    features, read_statistics, frechet_distance, save_grid
    training     optimizer_step, update_ema, Meter, compile_blocks, Graphed, graph_network
    denoisers    load_teacher, make_teacher, make_labels, save_samples
    running      init_distributed, pick_dtype, all_reduce_max, StopFlag, finish
    checkpoints  save_checkpoint, resume, set_aside, restore, Log

Conventions. Images are float32 NCHW in [-1, 1]. `t` is a long tensor (B,), 0 ... T-1; `x_t` at `t`
is what the network sees when it predicts the step to `t-1`; `s = -1` is the clean image. A label of
-1 is the null condition of guidance. A denoiser has the attributes `image_size`, `in_channels` and
`num_classes` (0 for none), and `net(x_t, t, y=None)` returns (B, C or 2C, H, W).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """A mistake in a setting or a file; the scripts print its message as one line, without a
    traceback."""


def arguments(local_variables):
    """The constructor's arguments, from its locals(): enough to rebuild the network."""
    return {k: v for k, v in local_variables.items() if k not in ('self', '__class__')}


# ==== Networks: denoisers


def timestep_embedding(t, dim):
    """Sinusoids of t (B,) -> (B, dim); cosines first, as in Improved DDPM and DiT."""
    half = dim // 2
    order = torch.arange(half, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(10000) * order / half)
    args = t[:, None].float() * freqs
    return F.pad(torch.cat([args.cos(), args.sin()], dim=-1), (0, dim % 2))


def zero_init(module):
    """Sets all parameters to zero, so that a residual branch ending in it starts at zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(channels):
    return nn.GroupNorm(math.gcd(32, channels), channels)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2. On CPUs, stacking copies is several times faster
    than F.interpolate."""

    def forward(self, x):
        if not x.is_cpu:
            return F.interpolate(x, scale_factor=2.0)
        B, C, H, W = x.shape
        x = torch.stack([x, x], dim=-1).flatten(3)  # (B, C, H, 2W)
        return torch.cat([x, x], dim=-1).view(B, C, 2 * H, 2 * W)


class ResBlock(nn.Module):
    """ADM's residual block. `resample` (None, 'down', 'up') acts on both branches (BigGAN)."""

    def __init__(self, in_ch, out_ch, emb_ch, dropout, scale_shift, resample=None):
        super().__init__()
        self.scale_shift = scale_shift
        if resample == 'down':
            self.resample = nn.AvgPool2d(2)
        elif resample == 'up':
            self.resample = Upsample()
        else:
            self.resample = nn.Identity()
        emb_out = 2 * out_ch if scale_shift else out_ch
        self.in_layers = nn.Sequential(
            group_norm(in_ch), nn.SiLU(), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_ch, emb_out))
        self.out_layers = nn.Sequential(
            group_norm(out_ch), nn.SiLU(), nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_ch, out_ch, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if in_ch == out_ch else nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x, emb):
        norm1, act, conv1 = self.in_layers
        norm2, _, dropout, conv2 = self.out_layers
        h = conv1(self.resample(act(norm1(x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + emb)
        return self.skip_connection(self.resample(x)) + conv2(dropout(act(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels. The two orders differ in how the qkv channels are split
    into heads."""

    def __init__(self, channels, num_heads, new_order):
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        # the 1x1 convolutions run as linear layers: attention is fastest with channels last
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        qkv = F.linear(h, self.qkv.weight[:, :, 0], self.qkv.bias)
        if self.new_order:
            q, k, v = qkv.view(B, H * W, 3, self.num_heads, -1).transpose(1, 3).unbind(2)
        else:
            q, k, v = qkv.view(B, H * W, self.num_heads, 3, -1).transpose(1, 2).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, H*W, C/heads)
        h = h.transpose(1, 2).reshape(B, H * W, C)
        h = F.linear(h, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class Stack(nn.ModuleList):
    """Layers applied in sequence; the residual blocks among them also take the time embedding."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """The U-Net of ADM / Improved DDPM (Dhariwal & Nichol 2021, Nichol & Dhariwal 2021).

    x (B, in_channels, H, H), t (B,), y (B,) or None -> (B, out_channels, H, H), H = image_size.
    Parameter names and shapes are ADM's, so ADM, DDPM-IP, DKDM and LDM checkpoints load with
    strict=True. `patch_size` folds pixels into channels at the input and back at the output;
    `attention_resolutions` are side lengths of feature maps after folding. `num_classes = 0` is
    unconditional; the label -1 adds no embedding. `time_scale` multiplies t before it is embedded
    (Improved DDPM's rescale_timesteps: 1000 / T). Raises UserError if the sizes do not fit.
    """

    castable = True  # its weights may be cast once, see cast_frozen

    def __init__(
        self, image_size, in_channels=3, out_channels=3, model_channels=128, num_res_blocks=3,
        channel_mult=(1, 2, 2, 2), attention_resolutions=(16, 8), num_heads=4, num_head_channels=32,
        dropout=0.0, num_classes=0, use_scale_shift_norm=True, resblock_updown=True,
        use_new_attention_order=True, patch_size=1, time_scale=1.0
    ):
        super().__init__()
        self.config = arguments(locals()) | {'class': 'UNet'}
        self.image_size = image_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.model_channels = model_channels
        self.patch_size = patch_size
        self.time_scale = time_scale
        side = image_size // patch_size
        halvings = len(channel_mult) - 1
        if image_size % patch_size or side % 2**halvings:
            raise UserError(
                f'image_size {image_size} cannot be cut into patches of {patch_size} and then '
                f'halved {halvings} times: use fewer entries in channel_mult or another patch_size'
            )
        emb_ch = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_ch), nn.SiLU(), nn.Linear(emb_ch, emb_ch)
        )
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, emb_ch)

        def res(in_ch, out_ch, resample=None):
            return ResBlock(in_ch, out_ch, emb_ch, dropout, use_scale_shift_norm, resample)

        def attention(ch):
            heads = num_heads if num_head_channels == -1 else max(1, ch // num_head_channels)
            if ch % heads:
                raise UserError(f'{ch} channels cannot be cut into {heads} attention heads')
            return AttentionBlock(ch, heads, use_new_attention_order)

        def downsample(ch):
            if resblock_updown:
                return res(ch, ch, 'down')
            layer = nn.Sequential()
            layer.add_module('op', nn.Conv2d(ch, ch, 3, stride=2, padding=1))
            return layer

        def upsample(ch):
            if resblock_updown:
                return res(ch, ch, 'up')
            layer = nn.Sequential()
            layer.add_module('up', Upsample())
            layer.add_module('conv', nn.Conv2d(ch, ch, 3, padding=1))
            return layer

        widths = [int(mult * model_channels) for mult in channel_mult]
        ch = widths[0]
        first = nn.Conv2d(in_channels * patch_size**2, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stack([first])])
        skips = [ch]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                block = Stack([res(ch, width)])
                ch = width
                if side in attention_resolutions:
                    block.append(attention(ch))
                self.input_blocks.append(block)
                skips.append(ch)
            if level < halvings:
                self.input_blocks.append(Stack([downsample(ch)]))
                skips.append(ch)
                side //= 2
        self.middle_block = Stack([res(ch, ch), attention(ch), res(ch, ch)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                block = Stack([res(ch + skips.pop(), width)])
                ch = width
                if side in attention_resolutions:
                    block.append(attention(ch))
                if level > 0 and i == num_res_blocks:
                    block.append(upsample(ch))
                    side *= 2
                self.output_blocks.append(block)
        last = zero_init(nn.Conv2d(ch, out_channels * patch_size**2, 3, padding=1))
        self.out = nn.Sequential(group_norm(ch), nn.SiLU(), last)

    @property
    def first_layer(self):
        return self.input_blocks[0]

    @property
    def last_layer(self):
        return self.out[2], self.config['out_channels'], True

    def predict_channels(self, channels):
        self.config['out_channels'] = channels

    def forward(self, x, t, y=None):
        emb = self.time_embed(timestep_embedding(t * self.time_scale, self.model_channels))
        dtype = emb.dtype  # what autocast computes in
        if self.num_classes and y is not None:
            emb = emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 rounds small noise away
            h = self.first_layer(F.pixel_unshuffle(x, self.patch_size), emb).to(dtype)
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
        qkv = nn.Linear(hidden_size, 3 * hidden_size)
        proj = nn.Linear(hidden_size, hidden_size)
        self.attn = nn.ModuleDict({'qkv': qkv, 'proj': proj})
        fc1 = nn.Linear(hidden_size, mlp)
        fc2 = nn.Linear(mlp, hidden_size)
        self.mlp = nn.ModuleDict({'fc1': fc1, 'fc2': fc2})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        B, N, D = x.shape
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale1) + shift1
        qkv = self.attn['qkv'](h).view(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, D/heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + gate1 * self.attn['proj'](h)
        h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp['fc2'](F.gelu(self.mlp['fc1'](h), approximate='tanh'))


class DiT(nn.Module):
    """Diffusion transformer (Peebles & Xie 2023); parameter names are those of its authors'
    checkpoints.

    x (B, in_channels, H, H), t (B,), y (B,) or None -> the same size, with twice the channels if
    `learn_sigma`. `num_classes = 0` is unconditional; otherwise row `num_classes` of the label
    table is the null condition, which y = None and y = -1 select. Raises UserError where the sizes
    do not fit.
    """

    castable = True  # its weights may be cast once, see cast_frozen

    def __init__(
        self, image_size, patch_size=2, in_channels=4, hidden_size=384, depth=12, num_heads=6,
        mlp_ratio=4.0, num_classes=1000, learn_sigma=True
    ):
        super().__init__()
        self.config = arguments(locals()) | {'class': 'DiT'}
        if image_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise UserError(
                f'image_size {image_size} must be a multiple of patch_size {patch_size}, and '
                f'hidden_size {hidden_size} of num_heads {num_heads} and of 4'
            )
        self.image_size = image_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        grid = image_size // patch_size
        # fixed 2-D sine-cosine positions: the first half of the channels encodes the column, the
        # second half the row
        columns = torch.arange(grid).repeat(grid)
        rows = torch.arange(grid).repeat_interleave(grid)
        tables = []
        for position in (columns, rows):
            table = timestep_embedding(position, hidden_size // 2)
            tables.append(table.roll(hidden_size // 4, dims=1))  # here DiT puts the sines first
        self.pos_embed = nn.Parameter(torch.cat(tables, dim=1)[None], requires_grad=False)
        proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.x_embedder = nn.ModuleDict({'proj': proj})
        mlp = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.t_embedder = nn.ModuleDict({'mlp': mlp})
        if num_classes:
            table = nn.Embedding(num_classes + 1, hidden_size)
            self.y_embedder = nn.ModuleDict({'embedding_table': table})
        blocks = [DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        linear = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.final_layer = nn.ModuleDict({'linear': linear, 'adaLN_modulation': modulation})

        # initialisation
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(proj.weight.view(hidden_size, -1))
        nn.init.zeros_(proj.bias)
        nn.init.normal_(mlp[0].weight, std=0.02)
        nn.init.normal_(mlp[2].weight, std=0.02)
        if num_classes:
            nn.init.normal_(self.y_embedder['embedding_table'].weight, std=0.02)
        for block in self.blocks:
            zero_init(block.adaLN_modulation)
        zero_init(self.final_layer)

    @property
    def first_layer(self):
        return self.x_embedder

    @property
    def last_layer(self):
        return self.final_layer['linear'], self.out_channels, False

    def predict_channels(self, channels):
        self.out_channels = channels
        self.config['learn_sigma'] = channels > self.in_channels

    def forward(self, x, t, y=None):
        B, p = len(x), self.patch_size
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 rounds small noise away
            h = self.x_embedder['proj'](x)
        grid = h.shape[-1]
        h = h.flatten(2).transpose(1, 2) + self.pos_embed  # (B, grid*grid, hidden)
        c = self.t_embedder['mlp'](timestep_embedding(t, 256))
        if self.num_classes:
            y = torch.full_like(t, -1) if y is None else y
            c = c + self.y_embedder['embedding_table'](torch.where(y < 0, self.num_classes, y))
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer['adaLN_modulation'](c)[:, None].chunk(2, dim=-1)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        h = self.final_layer['linear'](h).view(B, grid, grid, p, p, self.out_channels)
        return torch.einsum('nhwpqc->nchpwq', h).reshape(B, self.out_channels, grid * p, grid * p)


# --student=NAME. A third one is added here: a class of (image_size, in_channels, num_classes, ...)
# with these attributes. Its argument out_channels or learn_sigma says how many it predicts.
DENOISERS = {'unet': UNet, 'dit': DiT}


def resize(images, size):
    """Float images (B, C, H, W) as squares of `size` a side."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(
        images, size=(size, size), mode='bilinear', antialias=True, align_corners=False
    )


def preprocess(net, images):
    """Images (B, C, H, W) in [-1, 1] as the classifier expects them: resized to its `image_size`
    and normalised by its `mean` and `std` (of images in [0, 1]), where it has these attributes."""
    if getattr(net, 'image_size', 0):
        images = resize(images, net.image_size)
    if not hasattr(net, 'mean'):
        return images
    if getattr(net, 'normalisation', None) is None or net.normalisation.device != images.device:
        rows = [torch.tensor(v, dtype=torch.float32) for v in (net.mean, net.std)]
        net.normalisation = torch.stack(rows).to(images.device)  # sent to the device once
    mean, std = net.normalisation.to(images).view(2, 1, -1, 1, 1)
    return ((images + 1) / 2 - mean) / std


# ==== Diffusion


def gaussian_kl(q, p):
    """KL(q || p) of diagonal Gaussians (mean, std), summed over all but the batch: (B,)."""
    kl = (p[1] / q[1]).log() + (q[1] ** 2 + (q[0] - p[0]) ** 2) / (2 * p[1] ** 2) - 0.5
    return kl.sum((1, 2, 3))


def betas_from_alpha_bar(alpha_bar):
    """The betas (T,) of the variance-preserving process with this decreasing alpha_bar (T,).

    Dividing any process x_t = a_t x_0 + b_t eps by sqrt(a_t^2 + b_t^2) makes it one, with
    alpha_bar = a^2 / (a^2 + b^2): `Diffusion(betas_from_alpha_bar(alpha_bar).tolist())`.
    """
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    return 1 - alpha_bar / before


class Diffusion:
    """A forward process x_t = a_t x_0 + b_t eps, and how to interpret a network's output on it.

    schedule: 'cosine', 'linear', 'sqrt_linear' or a list of betas (a = sqrt(alpha_bar),
        b = sqrt(1 - alpha_bar)), or 'flow' (b = (t+1)/T, a = 1 - b; `shift` moves b towards 1,
        Esser et al. 2024, Eq. (23)).
    prediction: what the network's first C channels are: 'eps', 'v' = a eps - b x_0, 'x0', or
        'flow' = eps - x_0.
    learn_sigma: the network has C more channels, 2 v - 1 with the v of DKDM Eq. (12). The methods
        look at an output's channels, not at this flag, so that a teacher with a learned variance
        can train a student without one.
    clip: clamp the predicted x_0 to [-1, 1] (True, for pixels), to [-c, c] (a number c) or not
        (False, for latents).
    large_variance: without a learned variance, a step to t-1 has the variance of q(x_t | x_t-1),
        not the posterior's (DDPM's "fixed large").

    A step t -> s may have any length, s < t; both are long tensors (B,) or ints, and s = -1 is
    the clean image. Raises UserError for an unknown schedule or prediction, or betas outside
    0 ... 1.
    """

    def __init__(
        self, schedule='cosine', steps=1000, prediction='eps', learn_sigma=True, clip=True,
        beta_range=(1e-4, 0.02), shift=1.0, large_variance=False
    ):
        if prediction not in ('eps', 'v', 'x0', 'flow'):
            raise UserError(f"no prediction {prediction!r}: 'eps', 'v', 'x0' or 'flow'")
        self.config = arguments(locals())
        self.prediction = prediction
        self.learn_sigma = learn_sigma
        self.clip = float(clip)
        self.large_variance = large_variance
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        if schedule == 'flow':
            b = time[1:]
            b = shift * b / (1 + (shift - 1) * b)
            a = 1 - b
        else:
            if not isinstance(schedule, str):
                betas = torch.as_tensor(schedule, dtype=torch.float64)
            elif schedule == 'cosine':  # Improved DDPM, Eq. (17)
                f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
                betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
            elif schedule == 'linear':
                low, high = (beta * 1000 / steps for beta in beta_range)
                betas = torch.linspace(low, high, steps, dtype=torch.float64)
            elif schedule == 'sqrt_linear':  # LDM
                low, high = (math.sqrt(beta) for beta in beta_range)
                betas = torch.linspace(low, high, steps, dtype=torch.float64) ** 2
            else:
                raise UserError(
                    f"no schedule {schedule!r}: 'cosine', 'linear', 'sqrt_linear', 'flow' or betas"
                )
            alpha_bar = torch.cumprod(1 - betas, dim=0)
            a = alpha_bar.sqrt()
            b = (1 - alpha_bar).sqrt()
        if len(a) < 2 or not (a.isfinite() & (b > 0) & (b <= 1)).all():
            raise UserError('a process needs at least two steps, and betas between 0 and 1')
        if prediction == 'eps' and a[-1] < 1e-8:
            raise UserError(
                "prediction 'eps' does not work on schedule 'flow' or with zero terminal SNR "
                '(rescale_betas_zero_snr): at t = T-1 x_t is pure noise, so eps does not determine '
                "x_0; use 'v', 'x0' or 'flow'"
            )
        self.T = len(a)
        # index -1 (the last entry) is the clean image; float64, cast only when applied to images
        self.a = torch.cat([a, torch.ones(1, dtype=torch.float64)])
        self.b = torch.cat([b, torch.zeros(1, dtype=torch.float64)])
        self.alpha_bar = self.a**2 / (self.a**2 + self.b**2)
        # variances are clamped to that of step 1 -> 0 before their logarithm is taken
        self.floor = self.posterior(torch.zeros(1), torch.zeros(1), 1, 0)[1].item()

    def ab(self, t, like):
        """(a_t, b_t) in float64 (float32 on MPS), shaped to broadcast against images."""
        if self.a.device != like.device:
            dtype = torch.float32 if like.device.type == 'mps' else torch.float64
            self.a = self.a.to(like.device, dtype)
            self.b = self.b.to(like.device, dtype)
        return self.a[t].view(-1, 1, 1, 1), self.b[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, noise):
        """x_t ~ q(x_t | x_0), DKDM Eq. (4)."""
        a, b = self.ab(t, x0)
        return a.to(x0) * x0 + b.to(x0) * noise

    def target(self, x0, x_t, t, to, eps=None):
        """The output of kind `to` that a perfect network gives for this (x_0, x_t): any two of x_0,
        x_t and eps determine the third. If eps is known, it need not be computed."""
        if to == 'x0':
            return x0
        a, b = self.ab(t, x_t)
        if eps is None:
            eps = ((x_t - a * x0) / b).to(x_t)
        if to == 'eps':
            return eps
        if to == 'v':
            return (a * eps - b * x0).to(x_t)
        return eps - x0  # flow

    def predict_x0(self, out, x_t, t, clip=None):
        """The x_0 that a network's output implies, clamped to [-clip, clip] (None:
        `self.clip`). Where it is clamped no gradient passes: clip=False to differentiate."""
        out = out[:, : x_t.shape[1]].float()
        a, b = self.ab(t, x_t)
        if self.prediction == 'eps':
            x0 = (x_t - b * out) / a.clamp(min=1e-8)
        elif self.prediction == 'v':
            x0 = (a * x_t - b * out) / (a**2 + b**2)
        elif self.prediction == 'flow':
            x0 = (x_t - b * out) / (a + b)
        else:
            x0 = out
        x0 = x0.to(x_t)
        clip = self.clip if clip is None else clip
        return x0.clamp(-clip, clip) if clip else x0

    def convert(self, out, x_t, t, to):
        """A network's output re-expressed as the prediction `to`, by way of its (clamped) x_0. The
        variance channels are unchanged."""
        if to == self.prediction:
            return out
        mean = self.target(self.predict_x0(out, x_t, t), x_t, t, to)
        return torch.cat([mean, out[:, x_t.shape[1] :].float()], dim=1)

    def posterior(self, x0, x_t, t, s=None):
        """(mean, var, beta) of q(x_s | x_t, x_0), DKDM Eqs. (5)-(7) generalised to any s < t: its
        mean and variance, and the variance of q(x_t | x_s), which is beta_t for s = t-1. s = None
        is t-1."""
        s = t - 1 if s is None else s
        a_t, b_t = self.ab(t, x_t)
        a_s, b_s = self.ab(s, x_t)
        ratio = a_t / a_s
        beta = (b_t**2 - ratio**2 * b_s**2).clamp(min=0)
        mean = (a_s * beta / b_t**2).to(x_t) * x0 + (ratio * b_s**2 / b_t**2).to(x_t) * x_t
        return mean, b_s**2 * beta / b_t**2, beta

    def mean_logvar(self, out, x_t, t, s=None, clip=None):
        """Mean and log variance (B, C, H, W) of p(x_s | x_t), DKDM Eqs. (8) and (12). s = None is
        t-1.

        At s = -1 the posterior's variance is zero; the log variance of the step before takes its
        place, as in Improved DDPM.
        """
        C = x_t.shape[1]
        mean, var, beta = self.posterior(self.predict_x0(out, x_t, t, clip), x_t, t, s)
        low = var.clamp(min=self.floor).log()
        if out.shape[1] == C:  # no learned variance
            if self.large_variance:  # not after a jump: x_s would have more noise than b_s
                one_step = s is None or t - s == 1
                if torch.is_tensor(one_step):
                    low = torch.where(one_step.view(-1, 1, 1, 1), beta.log(), low)
                elif one_step:
                    low = beta.log()
            return mean, low.to(x_t).expand_as(x_t)
        v = (out[:, C:].float() + 1) / 2
        return mean, (v * beta.log() + (1 - v) * low).to(x_t)  # Eq. (12)

    def ddpm_step(self, out, x_t, t, s, noise=None):
        """x_s ~ p(x_s | x_t); no noise where s = -1."""
        mean, logvar = self.mean_logvar(out, x_t, t, s)
        noise = torch.randn_like(x_t) if noise is None else noise
        noisy = (s >= 0).view(-1, 1, 1, 1) if torch.is_tensor(s) else s >= 0
        return mean + noisy * (0.5 * logvar).exp() * noise

    def ddim_step(self, out, x_t, t, s, eta=0.0, noise=None):
        """One step of DDIM (Song et al. 2021, Eq. (12)); eta = 1 gives the posterior's variance. On
        a flow and without clipping, eta = 0 is an Euler step."""
        x0 = self.predict_x0(out, x_t, t)
        a_s, b_s = self.ab(s, x_t)
        sigma = eta * self.posterior(x0, x_t, t, s)[1].sqrt()
        eps = self.target(x0, x_t, t, 'eps')
        x_s = a_s * x0 + (b_s**2 - sigma**2).clamp(min=0).sqrt() * eps
        if eta:
            x_s = x_s + sigma * (torch.randn_like(x_t) if noise is None else noise)
        return x_s.to(x_t)

    def losses(self, out, target, x_t, true_mean, true_logvar, t, lam, x0=None):
        """L_simple + lam T KL, DKDM Eqs. (13) and (19): {'loss', 'mse', 'vb'}, each (B,).

        The KL is in bits and trains the variance only: as in Improved DDPM, the student's mean
        enters it detached, and unclamped. If x0 is given, the negative log-likelihood of its 8-bit
        pixels replaces the KL at t = 0.
        """
        C = x_t.shape[1]
        mse = F.mse_loss(out[:, :C].float(), target, reduction='none').mean((1, 2, 3))
        if out.shape[1] == C or lam == 0:
            return {'loss': mse, 'mse': mse, 'vb': torch.zeros_like(mse)}
        variance_only = torch.cat([out[:, :C].detach(), out[:, C:]], dim=1)
        mean, logvar = self.mean_logvar(variance_only, x_t, t, clip=False)
        kl = logvar - true_logvar - 1 + (true_logvar - logvar).exp()
        kl = 0.5 * (kl + (true_mean - mean) ** 2 * (-logvar).exp())
        if x0 is not None:
            kl = torch.where((t == 0).view(-1, 1, 1, 1), pixel_nll(x0, mean, logvar), kl)
        vb = lam * self.T * kl.mean((1, 2, 3)) / math.log(2)
        return {'loss': mse + vb, 'mse': mse, 'vb': vb}

    def training_loss(self, out, x0, x_t, t, noise, lam=0.001):
        """Training on images, DKDM Eqs. (9), (11), (13): {'loss', 'mse', 'vb'}, each (B,)."""
        mean, var, _ = self.posterior(x0, x_t, t)
        logvar = var.clamp(min=self.floor).log().to(x_t)
        target = self.target(x0, x_t, t, self.prediction, noise)
        return self.losses(out, target, x_t, mean, logvar, t, lam, x0)

    def distill_loss(self, student_out, teacher_out, x_t, t, lam=0.001):
        """Training on a teacher's output, converted to this prediction, DKDM Eqs. (19)-(21):
        {'loss', 'mse', 'vb'}, each (B,)."""
        teacher_out = teacher_out.detach().float()
        mean, logvar = self.mean_logvar(teacher_out, x_t, t)
        return self.losses(student_out, teacher_out[:, : x_t.shape[1]], x_t, mean, logvar, t, lam)


def pixel_nll(x, mean, logvar):
    """-log of the Gaussian's probability of the 8-bit bin of x in [-1, 1] (Ho et al. 2020,
    Eq. (13)); the outermost bins extend to infinity."""
    inv_std = (-0.5 * logvar).exp()

    def cdf(z):
        return 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    up = torch.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) * inv_std))
    down = torch.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) * inv_std))
    return -(up - down).clamp(min=1e-12).log()


# ==== Sampling


def guided(net, x_t, t, y=None, guidance=1.0):
    """The network's output under classifier-free guidance (Ho & Salimans 2022):
    null + guidance (cond - null), from two evaluations in one batch. If guidance = 1 or y is None,
    there is only one evaluation. The variance is that of the conditional evaluation."""
    if y is None or guidance == 1:
        return net(x_t, t, y)
    C = x_t.shape[1]
    null = torch.full_like(y, -1)
    out = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null]))
    cond, null = out.chunk(2)
    mean = null[:, :C] + guidance * (cond - null)[:, :C]
    return torch.cat([mean, cond[:, C:]], dim=1)


def sampling_steps(T, steps, spacing='trailing'):
    """Timesteps, from noise to image. 'trailing': evenly spaced from T-1, the last jump as long as
    the others (Lin et al. 2024); 'even': evenly spaced and including both T-1 and 0 (Improved
    DDPM); 'leading': multiples of T // steps, down to 0 (DDIM). Raises UserError unless
    1 <= steps <= T."""
    if not 1 <= steps <= T:
        raise UserError(f'{steps} sampling steps: must be from 1 to {T}')
    if spacing == 'leading':
        return list(range(0, T, T // steps))[:steps][::-1]
    if spacing == 'even' and steps > 1:
        return [round(i * (T - 1) / (steps - 1)) for i in range(steps)][::-1]
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def random_normal(shape, generator, device):
    """Standard normal numbers on `device`, drawn on the generator's own device."""
    on = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=on).to(device)


def dpm_step(diffusion, x_t, t, s, x0, before=None):
    """One step of DPM-Solver++(2M) (Lu et al. 2022, Alg. 2) from x_t to x_s. `before`: the (t, x0)
    of the step before; without it, and to the clean image, the step is of first order."""
    a_t, b_t = diffusion.ab(t, x_t)
    a_s, b_s = diffusion.ab(s, x_t)
    if before is not None and s >= 0:
        a_r, b_r = diffusion.ab(before[0], x_t)
        # lambda = log(a / b), which is -infinity at the start of a flow
        log_r = (a_r / b_r).clamp(min=3.2e-5).log()
        log_t = (a_t / b_t).clamp(min=3.2e-5).log()
        log_s = (a_s / b_s).log()
        x0 = x0 + (0.5 * (log_s - log_t) / (log_t - log_r)).to(x_t) * (x0 - before[1])
    ratio = b_s / b_t
    return ratio.to(x_t) * x_t + (a_s - a_t * ratio).to(x_t) * x0


@torch.inference_mode()
def sample(
    net, diffusion, shape_or_noise, steps=50, sampler='ddpm', y=None, guidance=1.0, generator=None,
    spacing='trailing'
):
    """Images (B, C, H, W), float32, from a network and its process.

    shape_or_noise: (B, C, H, W), or the noise itself. y: labels (B,), -1 for none. sampler: 'ddpm'
    (ancestral), 'ddim' or 'dpm++' (DPM-Solver++ of second order). generator: draws the noise of the
    start and of every step. spacing: see `sampling_steps`. Raises UserError.
    """
    if sampler not in ('ddpm', 'ddim', 'dpm++'):
        raise UserError(f'no sampler {sampler!r}')
    x = shape_or_noise
    if not torch.is_tensor(x):
        x = random_normal(x, generator, next(net.parameters()).device)
    device = x.device
    times = sampling_steps(diffusion.T, steps, spacing)
    before = None
    for t, s in zip(times, times[1:] + [-1]):
        tt = torch.full((len(x),), t, device=device)
        out = guided(net, x, tt, y, guidance)
        if sampler == 'dpm++':
            x0 = diffusion.predict_x0(out, x, tt)
            x = dpm_step(diffusion, x, t, s, x0, before)
            before = t, x0
        elif sampler == 'ddpm':
            x = diffusion.ddpm_step(out, x, tt, s, random_normal(x.shape, generator, device))
        else:
            x = diffusion.ddim_step(out, x, tt, s)
    return x


# ==== Images and files


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def with_channels(images, channels):
    """uint8 images (N, 1 or 3, H, W) with 1 or 3 channels, or as they are if `channels` is 0."""
    if channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        parts = [(i * weights).sum(1, keepdim=True).round().byte() for i in images.split(500)]
        return torch.cat(parts)
    if channels == 3 and images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    return images


def read_safetensors(path):
    """(state dict, header dict) of a .safetensors: the header is the JSON that `save_model` puts
    under the key 'config' of the file's metadata, {} in other files. Raises UserError if the file
    is not complete."""
    import json

    dtypes = {
        'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
        'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8,
        'U8': torch.uint8, 'BOOL': torch.bool
    }
    with open(path, 'rb') as f:
        data = bytearray(f.read())
    begin = 8 + int.from_bytes(data[:8], 'little')
    try:
        index = json.loads(data[8:begin])
        metadata = index.pop('__metadata__', {})
        ends = [entry['data_offsets'][1] for entry in index.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{path} is not a file of weights in the format safetensors') from e
    if begin + max(ends, default=0) != len(data):
        raise UserError(f'{path} is incomplete')
    state = {}
    for name, entry in index.items():
        low, high = (begin + offset for offset in entry['data_offsets'])
        if low == high:
            state[name] = torch.zeros(entry['shape'], dtype=dtypes[entry['dtype']])
        else:  # a copy, so that it is aligned
            values = torch.frombuffer(data[low:high], dtype=dtypes[entry['dtype']])
            state[name] = values.view(entry['shape'])
    return state, json.loads(metadata.get('config', '{}'))


# ==== Part 2, the plumbing: files
import contextlib
import csv
import errno
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from datetime import timedelta

import numpy as np
import torch.distributed as dist
from safetensors.torch import save
from tqdm import tqdm

WEIGHTS = ('.safetensors', '.pt', '.pth', '.th', '.ckpt', '.bin')


def check(ok, message):
    """Raises UserError unless ok."""
    if not ok:
        raise UserError(message)


def existing(path):
    """`path`. Raises UserError if there is no file."""
    check(os.path.isfile(path), f'no file {path}')
    return path


def read_lines(path):
    """The non-empty lines of a text file. Raises UserError."""
    with open(existing(path), encoding='utf-8') as f:
        lines = [line.strip() for line in f if line.strip()]
    check(lines, f'{path} is empty')
    return lines


def write_atomically(path, write):
    """Calls write(temporary path) and renames the result: a failed write changes nothing. Raises
    UserError if it fails."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    tmp = os.path.join(folder, '.tmp-' + name)
    try:
        write(tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # torch.save has its own words for a full disk
        full = getattr(e, 'errno', 0) == errno.ENOSPC or shutil.disk_usage(folder).free < 2**16
        why = f'no space left in {folder}' if full else e
        raise UserError(f'{path} was not written, and what it held before is kept: {why}') from e
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def description(net):
    """What a file says of its network: net.config, or the arguments of a user's build(). A module
    with neither is loaded as FILE.py:WEIGHTS."""
    own = getattr(net, 'built_as', None) or getattr(net, 'config', None)
    return own or {'class': 'file', 'file': 'FILE.py'}


def save_model(net, path, diffusion=None, **more):
    """Writes a self-describing safetensors file: the weights, and in its header, as JSON, the
    description that rebuilds the network, `diffusion.config`, and `more`: `vae`, the pipeline whose
    VAE decodes the latents; `pipeline`, that of the text encoders and the scheduler; `guided`,
    whether guidance is distilled into the predictions; `no_null`, whether it never saw the null
    condition; `sampling`, the sampler's settings; `prompts`, the file of texts. Raises UserError
    if a weight is not finite."""
    state = {}
    for k, v in net.state_dict().items():  # clones, because tied weights share memory
        state[k] = v.detach().cpu().clone(memory_format=torch.contiguous_format)
    for k, v in state.items():
        if v.is_floating_point() and not v.isfinite().all():
            raise UserError(f'{path} is not saved: {k} is not finite. Try a smaller --lr')
    header = {'net': description(net)}
    if diffusion:
        header['diffusion'] = diffusion.config
    header |= {k: v for k, v in more.items() if v}
    data = save(state, {'config': json.dumps(header)})
    write_atomically(path, lambda tmp: pathlib.Path(tmp).write_bytes(data))


def read_weights(path):
    """(state dict, header dict) of a .safetensors or a torch file. Code in a file is never run.
    Raises UserError for other files, and says what they are."""
    with open(existing(path), 'rb') as f:
        start = f.read(64)
    kinds = {
        b'version https://git-lfs': 'is a pointer of Git LFS, not the file itself: git lfs pull',
        b'<': 'is a web page, not a file of weights',
    }
    check(start, f'{path} is empty')
    for begins, what in kinds.items():
        check(not start.startswith(begins), f'{path} {what}')
    if path.endswith('.safetensors'):
        return read_safetensors(path)
    try:
        return torch.load(path, map_location='cpu', weights_only=True), {}
    except Exception as e:  # torch's own message would advise to run the code in the file
        whole = zipfile.is_zipfile(path) or not start.startswith(b'PK')
        what = 'holds objects other than tensors, which are not loaded because they could run code'
        raise UserError(f"{path} {what if whole else 'is incomplete'}") from e


def is_plain(spec):
    """Whether `spec` is a file of weights that does not describe their network."""
    return os.path.isfile(spec) and not spec.endswith('.py') and not read_weights(spec)[1]


def load_state(net, state, path):
    """load_state_dict(strict=True). Raises UserError for weights that do not fit or not finite."""
    ours = net.state_dict()
    odd = []
    for k in ours | state:
        if k in ours and k in state:
            fits = ours[k].shape == state[k].shape
        else:
            fits = k.endswith('num_batches_tracked')  # files from old versions of PyTorch lack it
        if not fits:
            odd.append(k)
    check(not odd, f'{path} does not fit: {len(odd)} parameters differ, the first is {odd[:1]}')
    for k, v in state.items():
        check(not v.is_floating_point() or v.isfinite().all(), f'{path}: its {k} is not finite')
    net.load_state_dict(state)
    return net


def frozen(net):
    return net.eval().requires_grad_(False)


def size_of(net):
    """'0.27 M parameters'"""
    return f'{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters'


def digest(net):
    """Eight hexadecimal digits, of a network's weights."""
    data = hashlib.sha256()
    for v in net.state_dict().values():
        data.update(v.detach().cpu().flatten().view(torch.uint8).numpy())
    return data.hexdigest()[:8]


def make(config):
    """Builds the network of a `net.config` or of a file's header, with random weights. A header may
    name one of the project's own adapters, which builds the network; it can name no other file."""
    config = dict(config)
    kind = config.pop('class')
    ours = {c.__name__: c for c in DENOISERS.values()} | {'LVAE': LVAE, 'classifier': classifier}
    if kind in ours:
        return ours[kind](**config)
    return adapter(config.pop('adapter', 'hub')).build(kind, config)


# ==== The door: what comes from elsewhere is loaded by a Python file with load(). A user's own file
# ==== and the files in adapters/ are the same thing.
ADAPTERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'adapters')


def adapter(name):
    """The module of one of the project's own adapters."""
    path = os.path.join(ADAPTERS, f'{name}.py')
    known = re.fullmatch('[a-z_]+', name) and os.path.exists(path)
    check(known, f'the project has no adapter {name!r}')
    return run_file(path)


def split_file(spec):
    """('my.py', 'weights.pt') of 'my.py:weights.pt', ('my.py', '') of 'my.py', else ('', spec)."""
    if spec.endswith('.py'):
        return spec, ''
    head, found, weights = spec.partition('.py:')
    return (head + '.py', weights) if found and not os.path.exists(spec) else ('', spec)


def run_file(path):
    """The module of a Python file, run once per process."""
    path = os.path.abspath(existing(path))
    if path not in sys.modules:
        spec = importlib.util.spec_from_file_location(path, path)
        sys.modules[path] = importlib.util.module_from_spec(spec)
        sys.path.append(os.path.dirname(path))  # so that it can import its neighbours
        spec.loader.exec_module(sys.modules[path])
    return sys.modules[path]


def build_from_file(path, **kw):
    """The network that build(**kw) in a user's file returns; `built_as` records the call."""
    module = run_file(path)
    check(hasattr(module, 'build'), f'{path} has no build(), which makes a student')
    net = module.build(**kw)
    net.built_as = {'class': 'file', 'file': os.path.basename(path)} | kw
    for name in ('num_classes', 'in_channels', 'image_size'):
        if name in kw and not hasattr(net, name):
            setattr(net, name, kw[name])
    return net


def load_from_file(kind, spec, known, **context):
    """(what was loaded, the header of its weights or {}) of 'FILE.py' or 'FILE.py:ARGUMENT'.

    The file's load_KIND(ARGUMENT, **known) is called if it has one, else its load(ARGUMENT,
    **known), with those of `context` that it has parameters for. Where ARGUMENT is a file of
    weights for the network that its build() makes, they are loaded into it. Raises UserError.
    """
    path, argument = split_file(spec)
    module = run_file(path)
    load = getattr(module, f'load_{kind}', None) or getattr(module, 'load', None)
    takes = inspect.signature(load).parameters if load else {}
    if argument.endswith(WEIGHTS) and os.path.isfile(argument):
        state, header = read_weights(argument)
        if kind_of(header) == 'file' or hasattr(module, 'build') and not takes:
            refuse_known(spec, known)
            kw = {k: v for k, v in header.get('net', {}).items() if k not in ('class', 'file')}
            state = state if header else adapter('original').unwrap(state, argument)
            return load_state(build_from_file(path, **kw), state, argument), header
    check(load, f'{path} has no load(), which makes a teacher')
    known = known | {k: v for k, v in context.items() if k in takes}
    arguments = [argument] if argument or spec.endswith(':') else []
    try:
        inspect.signature(load).bind(*arguments, **known)
    except TypeError as e:
        raise UserError(f'{spec}: its load() was called with {arguments}, {known}: {e}') from e
    return load(*arguments, **known), {}


def read_model(spec):
    """(state, header) of a file of weights whose network is not defined in a user's Python file."""
    state, header = read_weights(spec)
    file = header.get('net', {}).get('file')
    check(
        kind_of(header) != 'file',
        f'{spec}: its network is defined in {file}, which runs only if you name it: {file}:{spec}'
    )
    return state, header


def decode(net, z):
    """Decodes latents (B, C, h, w) to images (B, 3, H, W) with the network's VAE (`net.vae`), four
    at a time; without a VAE, z is returned as it is."""
    vae = getattr(net, 'vae', None)
    if vae is None:
        return z
    vae = vae.to(z.device)
    z = z.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get('shift_factor') or 0)
    return torch.cat([vae.decode(part).sample.float() for part in z.split(4)])


def attach_vae(net, vae):
    """Sets `net.vae`, not as a submodule: it is not trained or saved."""
    net.__dict__['vae'] = frozen(vae) if vae is not None else None


# ==== Loaders


def refuse_known(spec, known):
    """Raises UserError if settings are given for a model that would ignore them."""
    check(not known, f"{spec} says itself what it is: leave out {', '.join(known)}")


def load_denoiser(spec, dtype=torch.float32, **known):
    """(net, diffusion) from one string; the network is in eval mode and frozen.

    spec: a file of ours (.safetensors); an original checkpoint (.pt, .ckpt, .safetensors;
        adapters/original.py); a diffusers folder or hub id (adapters/hub.py); or a Python file,
        `my.py` or `my.py:ARGUMENT`, whose load() returns both, or `my.py:weights.safetensors`,
        whose build() makes the network.
    dtype: of the weights of a diffusers pipeline; all others are float32 (`cast_frozen`).
    known: what an original checkpoint does not record, or the arguments of a load().
    Raises UserError if it is none, or needs inputs other than x_t, t and y.
    """
    state, header = {}, {}
    file, argument = split_file(spec)
    if not file and (os.path.isfile(spec) or spec.endswith(WEIGHTS)):
        state, header = read_model(spec)
    if header:
        check('diffusion' in header, f'{spec} is not a denoiser but a {kind_of(header)}')
        refuse_known(spec, known)
        net = load_state(make(header['net']), state, spec)
    else:
        foreign = spec
        if not file:
            foreign = f"{ADAPTERS}/{'original' if state else 'hub'}.py:{spec}"
        net, header = load_from_file('denoiser', foreign, known, dtype=dtype)
    if header:
        check(
            'diffusion' in header,
            f'{argument} does not record its diffusion process; give {file} a load() that '
            'returns (net, diffusion)'
        )
        diffusion = Diffusion(**header['diffusion'])
        net.guided = header.get('guided', False)  # guidance is distilled into it
        net.no_null = header.get('no_null', False)  # it never saw the null condition
        net.sampling = header.get('sampling', {})
        net.source = header.get('pipeline') or header.get('vae', '')
        net.prompts = header.get('prompts', '')
        if header.get('vae'):
            check(
                os.path.isdir(net.source) or not os.path.isabs(net.source),
                f'{spec} needs the VAE of its teacher, {net.source}, which is not there any more'
            )
            attach_vae(net, adapter('hub').load_part(header['vae'], 'vae', 'vqvae'))
        if getattr(net, 'dtype_as_loaded', False):
            net.to(dtype)
    else:
        check(
            isinstance(net, tuple) and len(net) == 2,
            f'{spec} is not a denoiser: its load() must return (net, diffusion)'
        )
        net, diffusion = net
    return frozen(paired(net, diffusion)), diffusion


def paired(net, diffusion):
    """`net`, told its process if it wants to know (`set_process`)."""
    if hasattr(net, 'set_process'):
        net.set_process(diffusion)
    return net


def kind_of(header):
    return header.get('net', {}).get('class', 'model')


def classifier(name, num_classes=10, **kw):
    """An image classifier by its name: resnet8 ... resnet110 (6n+2), resnet18/34/50, wrn16_1 ...
    wrn40_2, vgg11/13/16/19 or torchvision:NAME. `forward(x)` gives logits (B, num_classes),
    `forward_features(x)` also the last map of every stage. kw and UserErrors:
    adapters/classifiers.py."""
    return adapter('classifiers').classifier(name, num_classes, **kw)


def LVAE(image_size=32, in_channels=3, width=128):
    """A ladder VAE of the slides: width 128 at 32 pixels is their teacher, 8 their student
    (adapters/ladder_vae.py)."""
    return adapter('ladder_vae').LVAE(image_size, in_channels, width)


def forward_features(net, x):
    """(logits, [last map (B, C, h, w) of each stage]) of a classifier that has a method of this
    name, or a list `net.stages` of the names of the layers that end its stages. Raises UserError if
    it has neither."""
    if hasattr(net, 'forward_features'):
        return net.forward_features(x)
    check(
        hasattr(net, 'stages'),
        f'this {type(net).__name__} gives no feature maps: add forward_features(x), or '
        'net.stages, the names of the layers that end its stages; or use --lam_msarc=0'
    )
    layers = [net.get_submodule(name) for name in net.stages]
    return adapter('classifiers').hooked_features(net, layers, x)


def load_classifier(spec, **known):
    """A frozen classifier in eval mode: a file of ours; a state dict (.th, .pt, .pth) from common
    public repositories, or torchvision:NAME (adapters/original.py); or a user's Python file. known:
    what a state dict does not record: image_size, mean, std (of images in [0, 1]), max_pool. Raises
    UserError."""
    state, header = {}, {}
    foreign = spec
    if not split_file(spec)[0]:
        foreign = f'{ADAPTERS}/original.py:{spec}'
        if not spec.startswith('torchvision:'):
            state, header = read_model(spec)
    if header:
        check(
            kind_of(header) == 'classifier', f'{spec} is not a classifier but a {kind_of(header)}'
        )
        refuse_known(spec, known)
        net = load_state(make(header['net']), state, spec)
    else:
        net, _ = load_from_file('classifier', foreign, known)
    return adapter('classifiers').complete(frozen(net), spec)


def load_vae(spec):
    """A frozen VAE or generator in eval mode: an LVAE of ours (.safetensors); an AutoencoderKL or
    AutoencoderTiny, alone or in a pipeline (adapters/hub.py); or a user's Python file. Raises
    UserError for anything else."""
    if split_file(spec)[0]:
        return frozen(load_from_file('vae', spec, {})[0])
    if spec.endswith(WEIGHTS):
        state, header = read_model(spec)
        check(kind_of(header) == 'LVAE', f'{spec} is not a VAE but a {kind_of(header)}')
        return frozen(load_state(make(header['net']), state, spec))
    return frozen(load_from_file('vae', f'{ADAPTERS}/hub.py:{spec}', {})[0])


# ==== Images


def load_images(spec, train=True, image_size=0, channels=0):
    """(images uint8 (N, C, H, W), labels int64 (N,) or None) from one string.

    spec: an ADM-style .npz (`arr_0` uint8 NHWC, `arr_1` labels); a folder of such shards; an .npy,
        which is mapped and not read; a folder of images, a list of files, or a torchvision dataset
        (mnist, cifar10, ...), of which `train` picks the split (adapters/images.py); or a Python
        file whose load() returns both. A suffix `:a-b` keeps only the classes a to b, and `:a,b,c`
        those classes, numbered in this order.
    image_size: the central square of every image is resized to it; 0 for neither. channels: 1 or 3
    converts the images; 0 leaves them. Raises UserError for files whose range is not known.
    """
    return adapter('images').load_images(spec, train, image_size, channels)


def open_npz(path):
    """np.load(path). Raises UserError for what is no file of arrays, or incomplete."""
    try:
        return np.load(existing(path), allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f'{path} is not a file of arrays, or it is incomplete: {e}') from e


def save_grid(path, sets, columns):
    """Writes a PNG of sets of images (B, C, H, W) in [-1, 1], alternating one row of `columns`
    images of each set; small images are enlarged to about 64 pixels. Only the first three channels
    are shown, or the first one if there are two."""
    from torchvision.utils import save_image

    columns = min(columns, len(sets[0]))  # the rows of two sets do not mix
    rows = []
    for parts in zip(*[images.split(columns) for images in sets]):
        rows += parts
    images = torch.cat(rows).float().cpu().clamp(-1, 1)
    images = images[:, : 3 if images.shape[1] >= 3 else 1]
    images = F.interpolate(images, scale_factor=float(max(1, 64 // images.shape[-1])))
    write_atomically(
        path, lambda tmp: save_image((images + 1) / 2, tmp, format='png', nrow=columns, padding=4)
    )


# ==== Measuring


def features(net, images):
    """(features (B, D), logits) of uint8 images; the features are the spatial mean of the
    classifier's last map, the input of its linear layer."""
    logits, maps = forward_features(net, preprocess(net, to_float(images)))
    return maps[-1].mean((2, 3)), logits


def load_features(spec, device):
    """(net, space, D): a classifier, the name of its feature space, which is stored with
    statistics, and the number of its features."""
    net = load_classifier(spec)
    space = f'{os.path.basename(spec)} {digest(net)}'
    net = net.to(device, memory_format=memory_format(device))
    side = net.image_size or 32
    with torch.no_grad():
        blank = torch.zeros(1, net.in_channels, side, side, device=device)
        return net, space, features(net, blank)[0].shape[1]


# the classifier and the statistics that go with images of 1 or 3 channels, where none are named
SPACES = {
    1: ('pretrained/mnist_resnet.safetensors', 'pretrained/mnist_stats.npz'),
    3: ('pretrained/cifar10_resnet.safetensors', 'pretrained/cifar10_stats.npz'),
}


def read_statistics(path, space):
    """The statistics that eval_fid.py or ADM stored for a set of images: 'mu', 'sigma', perhaps
    'mu_s', 'sigma_s', 'n'; None if the file holds images. Raises UserError for statistics of
    another feature space."""
    with open_npz(path) as z:
        if 'mu' not in z and 'pool_3' not in z:
            return None
        arrays = {k: z[k] for k in z if not k.startswith('arr_')}
    if 'mu' not in arrays:  # the features themselves, as of Song's score_sde
        features = arrays['pool_3'].astype(np.float64)
        arrays |= {'mu': features.mean(0), 'sigma': np.cov(features.T), 'n': len(features)}
    named = str(arrays.get('space', 'inception'))  # ADM's files do not name theirs
    check(
        named == space,
        f'{path} holds statistics in the feature space {named!r}, not {space!r}; make new ones '
        'with eval_fid.py --save_stats'
    )
    names = ('mu', 'sigma', 'mu_s', 'sigma_s', 'n')
    return {k: torch.as_tensor(arrays[k]).double() for k in names if k in arrays}


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, Eq. (6)),
    and whether sigma1 sigma2, by way of sigma1^(1/2) sigma2 sigma1^(1/2), is near singular."""
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ sigma2 @ root)
    distance = (
        ((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2).trace() - 2 * product.clamp(min=0).sqrt().sum()
    )
    return float(distance), bool(product[0] < 1e-14 * product[-1])


# ==== Training: what several scripts do at every step


def mean_and_backward(terms, loss_scale=1.0):
    """Backpropagates the mean sum of loss terms (B,) times `loss_scale`; returns their means."""
    (sum(terms.values()).mean() * loss_scale).backward()
    return {name: term.detach().mean() for name, term in terms.items()}


def learning_rate_factor(step, max_steps, warmup=0, decay=True):
    """A linear warm-up, and if `decay` a cosine to 0 at max_steps."""
    factor = min(1.0, (step + 1) / max(1, warmup))
    if decay:
        factor *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
    return factor


def set_learning_rate(opt, value):
    """Sets the learning rate of all groups, for a CUDA graph on the device."""
    for group in opt.param_groups:
        if not group.get('capturable'):
            group['lr'] = value
        elif torch.is_tensor(group['lr']):
            group['lr'].fill_(value)
        else:
            group['lr'] = torch.full((), value, device=group['params'][0].device)


@torch.no_grad()
def update_ema(net_ema, net, decay):
    """net_ema <- decay net_ema + (1 - decay) net; buffers are copied. `decay` is a number, or a
    tensor () that a CUDA graph reads."""
    averages = list(net_ema.parameters())
    weights = [p.detach() for p in net.parameters()]
    if torch.is_tensor(decay):
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, 1 - decay)
        torch._foreach_add_(averages, change)
    else:
        torch._foreach_lerp_(averages, weights, 1 - decay)
    for average, buffer in zip(net_ema.buffers(), net.buffers()):
        average.copy_(buffer)


def optimizer_step(net, opt, grad_clip=0.0):
    """Clips the gradients to the norm `grad_clip` (0: not at all), updates the weights and clears
    the gradients. Returns the norm, a tensor (). If it is not finite, the weights do not change; a
    fused optimiser finds that out without a wait for the device."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), grad_clip or float('inf'))
    if opt.defaults.get('fused'):
        opt.found_inf = (~norm.isfinite()).float()  # if 1, the fused optimiser skips the step
        opt.step()
    elif norm.isfinite():
        opt.step()
    opt.zero_grad(set_to_none=True)
    return norm


class Meter:
    """Sums of what a step returns, on the device: the host waits only where `means` is called."""

    def __init__(self, device, sums=None):
        self.sums = {k: v.to(device) for k, v in (sums or {}).items()}

    def add(self, values):
        """Adds {name: tensor ()}; one of them is 'grad_norm'."""
        one = torch.ones_like(values['grad_norm'])
        for name, value in (values | {'steps': one}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def means(self, step, net, save, advice):
        """{name: mean} since the last `clear`. If a gradient was not finite, which is so on all
        ranks or on none, the run ends: with `save()`, if the step left no other trace in `net`."""
        means = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist()))  # the one wait
        n = means.pop('steps')
        means = {name: value / n for name, value in means.items()}
        if not math.isfinite(means['grad_norm']):
            self.clear()
            state = [v for v in net.state_dict().values() if v.is_floating_point()]
            kept = bool(torch.stack([v.isfinite().all() for v in state]).all())  # BatchNorm's too
            if kept:
                save()
            how = '--init_from=resume goes on after it' if kept else 'the last checkpoint is intact'
            raise UserError(
                f'step {step}: the gradient was not finite in one of the last {n:.0f} steps; that '
                f'step changed no weights, and {how}. If it happens again, {advice}'
            )
        return means

    def clear(self):
        self.sums = {}


BLOCKS = (ResBlock, AttentionBlock, DiTBlock)


def compile_blocks(*nets):
    """torch.compile for each kind of block of the networks (None: no network), in minutes; a second
    run finds them in a cache. One without such blocks is compiled as a whole."""
    torch._dynamo.config.cache_size_limit = 256  # all blocks share one list
    for net in filter(None, nets):
        blocks = [m for m in net.modules() if isinstance(m, BLOCKS)]
        if getattr(getattr(net, 'net', None), '_repeated_blocks', None):  # of diffusers
            net.net.compile_repeated_blocks(dynamic=False)
        else:
            for block in blocks or [net]:
                block.compile(dynamic=False)


class Graphed:
    """f(*tensors) -> a tensor or a dict of tensors, as one CUDA graph: the host starts a whole step
    with one call instead of thousands.

    Three calls run as they are, on a stream of their own (lazy set-up must not be captured); the
    next one is captured, and from then on the graph is replayed. f must read and write the same
    memory in every call, and keep numbers that change in tensors; so does its optimiser `opt`, with
    the learning rate (`set_learning_rate`). If f waits for the device or cannot be captured, one
    line says why and the calls go on as they are. Results are overwritten by the next call.
    """

    def __init__(self, f, device, enabled=True, opt=None):
        self.f = f
        self.enabled = enabled and device.type == 'cuda'
        self.calls = 0
        self.graph = None
        self.opt = opt
        for group in opt.param_groups if opt else ():
            group['capturable'] = self.enabled
        if self.enabled:
            try:
                self.stream = torch.cuda.Stream()
            except RuntimeError as e:
                self.give_up(e)

    def __call__(self, *tensors):
        self.calls += 1
        if self.enabled and self.calls <= 3:
            return self.warm_up(tensors)
        if self.enabled and self.graph is None:
            self.capture(tensors)
        if not self.enabled:
            return self.f(*tensors)
        for mine, given in zip(self.inputs, tensors):
            mine.copy_(given)
        self.graph.replay()
        return self.result

    def warm_up(self, tensors):
        main = torch.cuda.current_stream()
        last = self.calls == 3  # in the first two, compilers and lazy set-up may wait
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=last) as caught:
            if last:
                warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode(int(last))  # warns where the host waits
            result = self.f(*tensors)
            torch.cuda.set_sync_debug_mode(0)
        main.wait_stream(self.stream)
        waits = [w for w in caught or () if 'called a synchronizing' in str(w.message)]
        if waits:
            self.give_up(f'{waits[0].filename}:{waits[0].lineno} waits for the device')
        return result

    def capture(self, tensors):
        main = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(False):
            self.inputs = [t.clone() for t in tensors]
        try:
            with torch.cuda.graph(graph):
                self.result = self.f(*self.inputs)
            self.graph = graph
        except RuntimeError as e:  # it may leave the stream and the generator in the capture
            torch.cuda.set_stream(main)
            graph.reset()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            self.broken = graph  # older versions of torch keep a pointer to it
            self.give_up(e.__context__ or e)

    def give_up(self, why):
        reason, _, _ = str(why).partition('\n')
        print(f'not run as a CUDA graph: {reason}')
        self.enabled = False
        if self.opt:
            self.opt.zero_grad(set_to_none=True)  # they are not valid after half a capture
            for group in self.opt.param_groups:
                group['capturable'] = False


def graph_network(net, device):
    """Lets calls of a network without gradients replay a CUDA graph, once their inputs have had the
    same size four times in a row: for sampling in many batches, on one GPU. Returns the network."""
    plain = net.forward
    graphed = None

    def forward(x_t, t, y=None):
        nonlocal graphed
        tensors = (x_t, t) if y is None else (x_t, t, y)
        if torch.is_grad_enabled() or len(x_t) == 1:  # FLOPs are counted with one image
            return plain(*tensors)
        size = [v.shape for v in tensors]
        settled = graphed and (graphed.graph or not graphed.enabled)
        if not settled and (graphed is None or graphed.size != size):
            graphed = Graphed(plain, device)
            graphed.size = size
        return graphed(*tensors).clone() if graphed.size == size else plain(*tensors)

    if device.type == 'cuda' and not dist.is_initialized():
        net.forward = forward
    return net


# ==== Teachers and students of dkdm.py and few_steps.py

def load_teacher(spec, known, guidance, prompts, device, dtype):
    """(net, diffusion, guidance): a denoiser on the device, its texts embedded, and the guidance at
    which it is distilled (0: 2 where it has a condition, else 1). `net.digest` is of weights and
    texts. Raises UserError for texts or guidance it cannot take."""
    net, diffusion = load_denoiser(spec, dtype, **known)
    name = digest(net)
    net = cast_frozen(net.to(device, memory_format=memory_format(device)), dtype)
    takes_text = getattr(net, 'condition', '') == 'text'
    wanted = 'texts: --prompts=file.txt' if takes_text else 'no texts (prompts)'
    check(bool(prompts) == takes_text, f'{spec} takes {wanted}')
    if takes_text:
        texts = read_lines(prompts)
        net.set_prompts(texts)
        name += hashlib.sha256('\n'.join(texts).encode()).hexdigest()[:8]
    net.digest = name
    if guidance == 0:
        trained = not getattr(net, 'guided', False) and not getattr(net, 'no_null', False)
        guidance = 2.0 if net.num_classes and trained else 1.0
        if net.num_classes and getattr(net, 'no_null', False) and rank_and_world()[0] == 0:
            print(f'{spec} has no null class: it is distilled without guidance')
    check_guidance(net, spec, guidance)
    return net, diffusion, guidance


def check_guidance(net, spec, guidance):
    """Raises UserError for guidance that a denoiser cannot take."""
    if guidance == 1:
        return
    why = ''
    if not net.num_classes:
        why = 'has no classes or texts'
    elif getattr(net, 'guided', False):
        why = 'already makes guided predictions'
    elif getattr(net, 'no_null', False):
        why = 'was trained without a null class'
    check(not why, f'guidance={guidance}: {spec} {why}: leave out guidance')


def make_teacher(net, guidance=1.0, autocast=contextlib.nullcontext()):
    """teacher(x_t, t, y): the network's guided output (B, C or 2C, H, W) in float32, without
    gradients."""

    @torch.no_grad()
    def teacher(x_t, t, y=None):
        with autocast:
            return guided(net, x_t, t, y, guidance).float()

    return teacher


def make_labels(num_classes, uncond_prob=0.0, device='cpu'):
    """draw_labels(n): labels (n,) of new images, -1 for the null condition; None for networks
    without classes."""

    def draw_labels(n):
        if not num_classes:
            return None
        y = torch.randint(num_classes, (n,), device=device)
        return torch.where(torch.rand(n, device=device) < uncond_prob, -1, y)

    return draw_labels


def save_samples(path, rows, decoder, seed, autocast, seconds_per_pass, since):
    """Writes a picture with a row of images for each of `rows`, (net, diffusion, guidance, steps,
    sampler), all from the same noise and labels; the VAE of `decoder` decodes latents. There are 36
    images in a row, or fewer if they would take more than 20 s and more than a tenth of the time
    since the last ones (at `since`)."""
    passes = 0
    for _, _, guidance, steps, _ in rows:
        passes += steps * (2 if guidance != 1 else 1)
    budget = max(20.0, 0.1 * (time.time() - since))
    n = int(min(36, budget / max(1e-9, passes * seconds_per_pass)))
    n = n if n < 12 else n // 12 * 12
    if n == 0:
        print(f'no {path}: even one image would take more than a tenth of the training')
        return
    sets = []
    for net, diffusion, guidance, steps, sampler in rows:
        device = next(net.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        shape = n, net.in_channels, net.image_size, net.image_size
        x = random_normal(shape, generator, device)
        y = None
        if net.num_classes:
            y = torch.arange(n, device=device) % 12 % net.num_classes
        at_once = n if x.numel() < 2**18 else 1  # large images: one by one, with a progress bar
        images = []
        for k in tqdm(range(0, n, at_once), 'pictures', leave=False, disable=at_once == n):
            part = slice(k, k + at_once)
            label = None if y is None else y[part]
            with autocast, torch.no_grad():
                z = sample(net, diffusion, x[part], steps, sampler, label, guidance, generator)
                images.append(decode(decoder, z))
        sets.append(torch.cat(images))
    save_grid(path, sets, 12)


# ==== Running: ranks, devices, signals


def rank_and_world():
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def init_distributed(device='auto', dtype='auto', seed=0):
    """(device, autocast, rank, world) of this process, alone or under torchrun (NCCL on GPUs, gloo
    on CPUs). autocast is a context for the networks' forward passes: bfloat16 or none. Raises
    UserError for a device that is not here, or an incomplete set-up of ranks."""
    rank, world = rank_and_world()
    missing = [k for k in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if k not in os.environ]
    check(
        world == 1 or not missing,
        f"WORLD_SIZE={world} is set, but not {', '.join(missing)}: start several ranks with "
        'torchrun, or unset WORLD_SIZE for one'
    )
    if device == 'auto':
        device = 'mps' if torch.backends.mps.is_available() else 'cpu'
        if torch.cuda.is_available():
            device = 'cuda'
    kind, _, index = device.partition(':')
    here = {'cpu': 1, 'cuda': torch.cuda.device_count(), 'mps': torch.backends.mps.is_available()}
    check(
        kind in here and (not index or index.isdecimal()),
        f"no device {device!r}: 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
    )
    check(int(index or 0) < here[kind], f'device={device}: torch sees {here[kind]:d} {kind} here')
    device = torch.device(device)
    if device.type == 'cuda':
        local = int(os.environ.get('LOCAL_RANK', 0))
        device = torch.device('cuda', local if world > 1 or device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # the first convolution reads x_t in float32
    if world > 1 and not dist.is_initialized():
        # CPU tensors go through gloo, so that all_reduce_max does not wait for the GPU. One rank
        # may work alone for hours (downloads). The prefix hides the addresses of dead ranks from a
        # restarted run.
        store, rank, world = next(dist.rendezvous('env://'))
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=6)
        )
    torch.manual_seed(seed)  # the same weights on every rank
    bf16 = pick_dtype(device, dtype) == torch.bfloat16
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16), rank, world


def per_rank(batch_size, world, grad_accum=1):
    """Images of one forward pass on one rank. Raises UserError for no whole number."""
    check(
        batch_size % (world * grad_accum) == 0,
        f'batch_size={batch_size} must be a multiple of {world} ranks x {grad_accum} accumulation '
        'steps'
    )
    return batch_size // world // grad_accum


def pick_dtype(device, dtype='auto'):
    """The dtype that networks compute in: `dtype`, or for 'auto' bfloat16 where the hardware has
    it, else float16 on GPUs (of frozen pipelines, without loss scaling) and float32 on CPUs."""
    if dtype != 'auto':
        return getattr(torch, dtype)
    if device.type == 'cuda':
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    can = {}
    if device.type == 'cpu' and hasattr(torch.cpu, 'get_capabilities'):
        can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get('avx512_bf16') or can.get('amx_bf16') else torch.float32


def cast_frozen(net, dtype):
    """Casts the convolutions and linear layers of a frozen network with `castable = True` to
    bfloat16 once, not in every call; except `first_layer`, which reads x_t in float32."""
    if dtype == torch.bfloat16 and getattr(net, 'castable', False):
        first = set(net.first_layer.modules()) if hasattr(net, 'first_layer') else set()
        for m in set(net.modules()) - first:
            if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                m.to(dtype)
    return net


def on_device(images, device):
    """A tensor on the device, unless it would take more than half of a GPU's memory."""
    if device.type == 'cuda' and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    return images.to(device)


def memory_format(device):
    """channels_last on GPUs, where it makes convolutions faster; on CPUs slower."""
    return torch.channels_last if device.type == 'cuda' else torch.contiguous_format


def all_reduce_max(value=0):
    """The maximum of `value` over all ranks, which wait for each other, but not for their GPUs."""
    if not dist.is_initialized():
        return value
    value = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


@contextlib.contextmanager
def local_rank_0_first():
    """Local rank 0 runs the block first (a download); its node's others follow."""
    waits = dist.is_initialized() and int(os.environ.get('LOCAL_RANK', 0))
    if waits:
        all_reduce_max()
    try:
        yield
    finally:
        if not waits:
            all_reduce_max()


class Stopped(Exception):
    """Raised by a signal inside `StopFlag.interrupts`."""


class StopFlag:
    """`signal` is 0 until Ctrl-C or SIGTERM, then its number; the loop then saves and leaves. In
    `with flag.interrupts():` it ends the block, of work that may be lost, such as pictures."""

    def __init__(self):
        self.signal = 0
        self.interrupting = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.receive)

    def receive(self, number, frame):
        self.signal = number
        if self.interrupting:
            self.interrupting = False
            raise Stopped

    @contextlib.contextmanager
    def interrupts(self):
        self.interrupting = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self.interrupting = False


def finish(stopped_by=0):
    """Ends the script: exit code 0, or 128 + the signal that stopped it."""
    code = 128 + int(stopped_by) if stopped_by else 0
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads may crash a normal exit
    sys.exit(code)


# ==== Checkpoints and logs

# settings that may change when a run is resumed; all others must stay the same
MAY_CHANGE = (
    'init_from', 'out_dir', 'max_steps', 'epochs', 'log_every', 'save_every', 'device', 'compile',
    'graph', 'wandb', 'any_teacher'
)


def lasting(settings):
    kept = {k: v for k, v in settings.items() if k not in MAY_CHANGE}
    return kept | {'ranks': rank_and_world()[1]}


def lock_out_dir(out_dir, rank):
    """Creates out_dir and locks it until this process ends. Raises UserError if another run holds
    the lock."""
    import fcntl  # not on Windows

    taken = False
    try:
        os.makedirs(out_dir, exist_ok=True)
        # it stays open until the process ends
        lock = os.open(os.path.join(out_dir, '.lock'), os.O_RDWR | os.O_CREAT)
    except OSError as e:
        raise UserError(f'out_dir={out_dir}: {e.strerror}') from e
    if rank == 0:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(lock, 0)
            os.write(lock, f'process {os.getpid()} on {os.uname().nodename}'.encode())
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            pass
    holder = os.read(lock, 99).decode()
    check(
        not all_reduce_max(taken),
        f'{out_dir} belongs to a run that has not ended, {holder}: use another --out_dir'
    )


def save_checkpoint(settings, step, net, opt, shared, own, rank, finished=False):
    """Writes `shared`, the state of all ranks (on rank 0), and `own`, the state of this rank, with
    its random generators. A run that is killed at any moment leaves a complete checkpoint:
    `ckpt.pt` names the step, and is renamed into place after all ranks have written. Another run
    takes the place of a `finished` one only."""
    out_dir = settings['out_dir']
    mine = f'ckpt_{step}_rank{rank}.pt'
    own = own | {'random': torch.get_rng_state()}
    if torch.cuda.is_initialized():
        own['random_cuda'] = torch.cuda.get_rng_state()
    write_atomically(os.path.join(out_dir, mine), lambda tmp: torch.save(own, tmp))
    all_reduce_max()
    if rank == 0:
        shared = {
            'net': net.state_dict(), 'opt': opt.state_dict(), **shared, 'step': step,
            'settings': lasting(settings), 'finished': finished
        }
        write_atomically(os.path.join(out_dir, 'ckpt.pt'), lambda tmp: torch.save(shared, tmp))
    all_reduce_max()
    for f in os.listdir(out_dir):
        if f.startswith(('ckpt_', '.tmp-ckpt_')) and f.endswith(f'_rank{rank}.pt') and f != mine:
            os.remove(os.path.join(out_dir, f))


RESULTS = ('student.safetensors', 'best.safetensors', 'student')


def resume(settings, rank, net):
    """(shared, own) of the checkpoint that a run resumes from, with its weights already in `net`;
    None for a new run, where `net` gets the weights of `init_from`, if that is a file. Locks
    out_dir. Raises UserError where a new run would take the place of an unfinished one."""
    out_dir, init_from, teacher = (settings[k] for k in ('out_dir', 'init_from', 'teacher'))
    for name in RESULTS:
        check(
            os.path.realpath(teacher) != os.path.realpath(os.path.join(out_dir, name)),
            f'teacher={teacher} would be overwritten by its student: use another --out_dir'
        )
    if init_from not in ('scratch', 'resume', 'overwrite', 'teacher'):
        state, header = read_weights(init_from)
        state = state if header else adapter('original').unwrap(state, init_from)
        load_state(net, state, init_from)
    lock_out_dir(out_dir, rank)
    path = os.path.join(out_dir, 'ckpt.pt')
    found = os.path.exists(path)
    check(
        found == all_reduce_max(found), f'out_dir={out_dir} must be a folder that all ranks share'
    )
    # torchrun --max-restarts resumes, whatever init_from says
    restarted = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'
    if init_from != 'resume' and not (restarted and found):
        if found and init_from != 'overwrite':
            shared, _ = read_weights(path)
            check(
                shared.get('finished', False),
                f"{out_dir} holds an unfinished run, at step {shared['step']}: --init_from=resume "
                'goes on with it, --init_from=overwrite begins anew; or use another --out_dir'
            )
        return None
    if not found:
        for name in RESULTS:
            check(
                not os.path.exists(os.path.join(out_dir, name)),
                f'{out_dir} has a {name}, but no checkpoint to resume from: use another --out_dir'
            )
        if rank == 0:
            print(f'{out_dir} has no checkpoint yet: starting from the beginning')
        return None
    shared, _ = read_weights(path)
    for k, v in lasting(settings).items():
        before = shared['settings'].get(k)
        check(
            before == v,
            f"{out_dir} holds a run with {k}={before!r}, not {v!r}: use that run's settings, or "
            'another --out_dir'
        )
    own, _ = read_weights(os.path.join(out_dir, f"ckpt_{shared['step']}_rank{rank}.pt"))
    net.load_state_dict(shared['net'])
    return shared, own


def set_aside(out_dir, rank):
    """Moves what an earlier run left in out_dir to out_dir/earlier-1, -2 ..., right before a new
    run writes its first file."""
    found = []
    for name in sorted(os.listdir(out_dir)):
        if name in RESULTS or name.startswith('ckpt') or name.endswith(('.csv', '.png')):
            found.append(name)
    if rank == 0 and found:
        k = 1
        while os.path.exists(os.path.join(out_dir, f'earlier-{k}')):
            k += 1
        folder = os.path.join(out_dir, f'earlier-{k}')
        os.makedirs(folder)
        for name in found:
            os.rename(os.path.join(out_dir, name), os.path.join(folder, name))
        print(f'the earlier run in {out_dir} was moved to {folder}')
    all_reduce_max()


def restore(checkpoint, opt):
    """Restores the optimiser and this rank's random generators, right before the loop."""
    shared, own = checkpoint
    hyper = [{k: v for k, v in group.items() if k != 'params'} for group in opt.param_groups]
    opt.load_state_dict(shared['opt'])
    for group, ours in zip(opt.param_groups, hyper):
        group.update(ours)  # for this device, not for that of the checkpoint
    torch.set_rng_state(own['random'])
    if torch.cuda.is_initialized() and 'random_cuda' in own:
        torch.cuda.set_rng_state(own['random_cuda'])
    return shared, own


class Log:
    """`log.csv`: one row per call; `step` comes first, `seconds` last. A resumed run drops the rows
    after the checkpoint's step and adds its time to `self.seconds`. Rank 0 only."""

    def __init__(self, path, step=0):
        lines = []
        if step and os.path.exists(path):
            with open(path, newline='') as f:
                rows = [line for line in f if line.endswith('\n')]  # drop an incomplete row
            lines = rows[:1] + [line for line in rows[1:] if int(line.split(',')[0]) <= step]
        self.seconds = float(lines[-1].split(',')[-1]) if len(lines) > 1 else 0.0
        write_atomically(path, lambda tmp: pathlib.Path(tmp).write_text(''.join(lines), newline=''))
        self.file = open(path, 'a', newline='')

    def __call__(self, **row):
        writer = csv.writer(self.file)
        if self.file.tell() == 0:
            writer.writerow(row)
        writer.writerow([f'{v:.6g}' if isinstance(v, float) else v for v in row.values()])
        self.file.flush()
