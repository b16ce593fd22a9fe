"""
Everything that the scripts share, in two parts.

Part 1, to copy from. It uses nothing from part 2 and imports only math and torch:
    networks     UNet, DiT, DENOISERS; classifier, preprocess; LVAE, combine, gaussian_kl
    diffusion    Diffusion: the process, its steps and losses; betas_from_alpha_bar
    sampling     guided, sampling_steps, sample

Part 2, the plumbing:
    weights      save_model, make, read_weights, unwrap, load_state, digest
    user files   run_file, build_from_file, load_from_file
    diffusers    Pipeline, decode, open_pipeline, load_part
    loaders      load_denoiser, load_classifier, load_vae
    images       load_images, to_tensor, to_float, to_uint8, save_grid
    measuring    features, load_features, read_statistics, frechet_distance
    running      init_distributed, pick_dtype, cast_frozen, all_reduce_max, finish
    checkpoints  lock_out_dir, save_checkpoint, resume, restore, Log

Conventions. Images are float32 NCHW in [-1, 1]. `t` is a long tensor (B,), 0 ... T-1; `x_t` at `t`
is what the network sees when it predicts the step to `t-1`; `s = -1` means the clean image. A class
label of -1 is the null condition of classifier-free guidance. A denoiser has the attributes
`image_size`, `in_channels` and `num_classes` (0 for none), and `net(x_t, t, y=None)` returns
(B, C or 2C, H, W). A mistake that the user can correct raises UserError.
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


# ==== Networks: classifiers


class ResidualBlock(nn.Module):
    """Convolutions with BatchNorm and ReLU plus a shortcut: 3x3 twice, or as a bottleneck
    1x1 - 3x3 - 1x1 at a quarter of the width.

    skip: the shortcut's name, which differs between families. kind: 'conv' (1x1 with BatchNorm)
    or 'pad' (zeros for the new channels) where the shape changes, or 'bare' (always a 1x1 without
    BatchNorm, as in the ladder VAE). side: if given, x is first resized to this side.
    """

    def __init__(self, in_ch, out_ch, stride, skip, kind='conv', bottleneck=False, side=None):
        super().__init__()
        self.skip = skip
        self.side = side
        mid = out_ch // 4
        if bottleneck:
            convs = [(in_ch, mid, 1, 1), (mid, mid, 3, stride), (mid, out_ch, 1, 1)]
        else:
            convs = [(in_ch, out_ch, 3, stride), (out_ch, out_ch, 3, 1)]
        self.depth = len(convs)
        if kind == 'bare':
            self.add_module(skip, nn.Conv2d(in_ch, out_ch, 1, stride, bias=False))
        for i, (a, b, kernel, by) in enumerate(convs, 1):
            self.add_module(f'conv{i}', nn.Conv2d(a, b, kernel, by, kernel // 2, bias=False))
            self.add_module(f'bn{i}', nn.BatchNorm2d(b))
        if kind == 'bare':
            return
        if in_ch == out_ch and stride == 1:
            shortcut = nn.Identity()
        elif kind == 'pad':
            extra = (out_ch - in_ch) // 2
            shortcut = nn.Sequential(
                nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, extra, extra))
            )
        else:
            conv = nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)
            shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_ch))
        self.add_module(skip, shortcut)

    def forward(self, x):
        if self.side:
            x = F.interpolate(x, size=(self.side, self.side))
        h = x
        for i in range(1, self.depth + 1):
            h = self.get_submodule(f'bn{i}')(self.get_submodule(f'conv{i}')(h))
            if i == self.depth:
                h = h + self.get_submodule(self.skip)(x)
            h = F.relu(h)
        return h


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
    bottleneck = depth == 50
    expansion = 4 if bottleneck else 1
    widths = [width * 2**i * expansion for i in range(len(counts))]
    layers = {
        'conv1': nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), 'bn1': nn.BatchNorm2d(width),
        'relu': nn.ReLU()
    }
    if max_pool:
        layers['maxpool'] = nn.MaxPool2d(3, 2, 1)
    maps = stages('layer', ResidualBlock, counts, width, widths, skip, shortcut, bottleneck)
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


def classifier(name, num_classes=10, image_size=32, mean=(0.5,), std=(0.5,), **kw):
    """An image classifier by its name: resnet8 ... resnet110 (6n+2), resnet18/34/50, wrn16_1 ...
    wrn40_2, vgg11/13/16/19 or torchvision:NAME.

    `forward(x)` gives logits (B, num_classes), `forward_features(x)` also the last map of every
    stage. `image_size`, `mean` and `std` (of images in [0, 1]) are used by `preprocess`. kw:
    in_channels; width, shortcut ('conv' or 'pad') and max_pool of the ResNets. Raises UserError for
    an unknown name.
    """
    family, _, sizes = name.partition(':')
    if family != 'torchvision':
        family = name.rstrip('0123456789_')
        sizes = name[len(family) :]
    depth, _, widen = sizes.partition('_')
    depth = int(depth) if depth.isdecimal() else 0
    if family == 'torchvision':
        net = Torchvision(sizes, num_classes, **kw)
    elif family == 'resnet' and (depth in (18, 34, 50) or depth >= 8 and depth % 6 == 2):
        net = resnet(depth, num_classes, **kw)
    elif family == 'wrn' and depth >= 10 and depth % 6 == 4 and widen.isdecimal():
        net = wide_resnet(depth, int(widen), num_classes, **kw)
    elif family == 'vgg' and depth in (11, 13, 16, 19):
        net = vgg(depth, num_classes, **kw)
    else:
        raise UserError(
            f'no classifier {name!r}: resnet8, 14, 20 ... 110, resnet18, 34 or 50, wrn16_1 ... '
            'wrn40_2, vgg11, 13, 16 or 19, torchvision:resnet34 and its like, or a Python file '
            'with build()'
        )
    for key, values in (('mean', mean), ('std', std)):
        if len(values) not in (1, kw.get('in_channels', 3)):
            raise UserError(f'{key}={values} must be one number, or one per channel')
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


# ==== Networks: the ladder VAE


class LadderLevel(nn.Module):
    """Two residual blocks, the first of which may resample, and a 1x1 convolution to a Gaussian.
    `resample` is None, 'downsample' (by 2) or 'upsample' (to `side`)."""

    def __init__(self, in_ch, width, out_ch, resample=None, side=None):
        super().__init__()
        stride = 2 if resample == 'downsample' else 1
        kind = 'bare' if resample else 'conv'
        first = ResidualBlock(in_ch, width, stride, resample or 'same', kind, side=side)
        self.net = nn.Sequential(first, ResidualBlock(width, width, 1, 'same'))
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
        self.config = arguments(locals()) | {'class': 'LVAE'}
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
        return nll.sum((1, 2, 3)), [gaussian_kl(a, b) for a, b in zip(q, p)]


def combine(a, b):
    """The product of two Gaussians (mean, std), each weighted by its precision."""
    precision_a = a[1] ** -2
    precision_b = b[1] ** -2
    var = 1 / (precision_a + precision_b)
    return var * (precision_a * a[0] + precision_b * b[0]), var.sqrt()


def gaussian_kl(q, p):
    """KL(q || p) of diagonal Gaussians (mean, std), summed over all but the batch: (B,)."""
    kl = (p[1] / q[1]).log() + (q[1] ** 2 + (q[0] - p[0]) ** 2) / (2 * p[1] ** 2) - 0.5
    return kl.sum((1, 2, 3))


# ==== Diffusion


def betas_from_alpha_bar(alpha_bar):
    """The betas (T,) of the variance-preserving process with this alpha_bar (T,), which decreases
    from near 1 to near 0.

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
    clip: clamp the predicted x_0 to [-1, 1]: True for pixels, False for latents.

    A step t -> s may have any length, s < t; both are long tensors (B,) or ints, and s = -1 is
    the clean image. Raises UserError for an unknown schedule or prediction, or betas outside
    0 ... 1.
    """

    def __init__(
        self, schedule='cosine', steps=1000, prediction='eps', learn_sigma=True, clip=True,
        beta_range=(1e-4, 0.02), shift=1.0
    ):
        if prediction not in ('eps', 'v', 'x0', 'flow'):
            raise UserError(f"no prediction {prediction!r}: 'eps', 'v', 'x0' or 'flow'")
        self.config = arguments(locals())
        self.prediction = prediction
        self.learn_sigma = learn_sigma
        self.clip = clip
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        if schedule == 'flow':
            if prediction == 'eps':
                raise UserError(
                    "prediction 'eps' does not work on schedule 'flow': at t = T-1 x_t is pure "
                    "noise, so eps does not determine x_0; use 'flow', 'v' or 'x0'"
                )
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
        self.T = len(a)
        # index -1 (the last entry) is the clean image; float64, cast only when applied to images
        self.a = torch.cat([a, torch.ones(1, dtype=torch.float64)])
        self.b = torch.cat([b, torch.zeros(1, dtype=torch.float64)])
        self.alpha_bar = self.a**2 / (self.a**2 + self.b**2)
        # variances are clamped to this value before their logarithm is taken: that of step 1 -> 0
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
        """The x_0 that a network's output implies, clamped to [-1, 1] if `clip` (None:
        `self.clip`)."""
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
        return x0.clamp(-1, 1) if clip else x0

    def convert(self, out, x_t, t, to):
        """A network's output re-expressed as the prediction `to`, by way of its (clamped) x_0. The
        variance channels are unchanged."""
        if to == self.prediction:
            return out
        mean = self.target(self.predict_x0(out, x_t, t), x_t, t, to)
        return torch.cat([mean, out[:, x_t.shape[1] :].float()], dim=1)

    def posterior(self, x0, x_t, t, s=None):
        """(mean, var, jump) of q(x_s | x_t, x_0), DKDM Eqs. (5)-(7) generalised to any s < t: its
        mean and variance, and the variance of q(x_t | x_s), which is beta_t for s = t-1. s = None
        is t-1."""
        s = t - 1 if s is None else s
        a_t, b_t = self.ab(t, x_t)
        a_s, b_s = self.ab(s, x_t)
        ratio = a_t / a_s
        jump = (b_t**2 - ratio**2 * b_s**2).clamp(min=0)
        mean = (a_s * jump / b_t**2).to(x_t) * x0 + (ratio * b_s**2 / b_t**2).to(x_t) * x_t
        return mean, b_s**2 * jump / b_t**2, jump

    def mean_logvar(self, out, x_t, t, s=None, clip=None):
        """Mean and log variance (B, C, H, W) of p(x_s | x_t), DKDM Eqs. (8) and (12). s = None is
        t-1.

        At s = -1 the posterior's variance is zero; the log variance of the step before takes its
        place, as in Improved DDPM.
        """
        C = x_t.shape[1]
        mean, var, jump = self.posterior(self.predict_x0(out, x_t, t, clip), x_t, t, s)
        low = var.clamp(min=self.floor).log()
        if out.shape[1] == C:  # no learned variance: the posterior's
            return mean, low.to(x_t).expand_as(x_t)
        v = (out[:, C:].float() + 1) / 2
        return mean, (v * jump.log() + (1 - v) * low).to(x_t)  # Eq. (12)

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

    def jump_x0(self, x_t, t, x_s, s):
        """The x_0 whose deterministic DDIM step from x_t lands on x_s (B, C, H, W).

        It solves x_s = a_s x_0 + b_s (x_t - a_t x_0) / b_t for x_0. At s = -1 that is x_s itself
        (Luhman & Luhman 2021); where x_s comes from two DDIM steps, it is the target of progressive
        distillation (Salimans & Ho 2022).
        """
        a_t, b_t = self.ab(t, x_t)
        a_s, b_s = self.ab(s, x_t)
        return ((x_s - b_s / b_t * x_t) / (a_s - a_t * b_s / b_t)).to(x_t)

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


def dpm_solver(diffusion, timesteps):
    """diffusers' second-order DPM-Solver++, for the variance-preserving version of a process."""
    from diffusers import DPMSolverMultistepScheduler

    betas = betas_from_alpha_bar(diffusion.alpha_bar[:-1].cpu().clamp(min=1e-9))
    solver = DPMSolverMultistepScheduler(
        trained_betas=betas.numpy(), num_train_timesteps=diffusion.T, prediction_type='sample',
        lower_order_final=True
    )
    solver.set_timesteps(timesteps=timesteps)
    return solver


@torch.inference_mode()
def sample(
    net, diffusion, shape_or_noise, steps=50, sampler='ddpm', y=None, guidance=1.0, generator=None,
    spacing='trailing'
):
    """Images (B, C, H, W), float32, from a network and its process.

    shape_or_noise: (B, C, H, W), or the noise itself. y: labels (B,), -1 for none. sampler: 'ddpm'
    (ancestral), 'ddim' or 'dpm++' (diffusers' second-order solver). generator:
    draws the starting noise and the noise of every step. spacing: see `sampling_steps`. Raises
    UserError for more steps than the process has.
    """
    device = next(net.parameters()).device
    x = shape_or_noise
    if not torch.is_tensor(x):
        x = random_normal(x, generator, device)
    ts = sampling_steps(diffusion.T, steps, spacing)
    if sampler == 'dpm++':
        solver = dpm_solver(diffusion, ts)
        norm = (diffusion.a**2 + diffusion.b**2).sqrt().tolist()  # x / norm is variance-preserving
        x = x / norm[ts[0]]
    for t, s in zip(ts, ts[1:] + [-1]):
        tt = torch.full((len(x),), t, device=device)
        x_t = x * norm[t] if sampler == 'dpm++' else x
        out = guided(net, x_t, tt, y, guidance)
        if sampler == 'dpm++':
            x = solver.step(diffusion.predict_x0(out, x_t, tt), t, x, return_dict=False)[0]
        elif sampler == 'ddpm':
            x = diffusion.ddpm_step(out, x, tt, s, random_normal(x.shape, generator, device))
        else:
            x = diffusion.ddim_step(out, x, tt, s)
    return x


# ==== Part 2, the plumbing: files
import contextlib
import csv
import glob
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import signal
import sys
from datetime import timedelta

import numpy as np
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save

WEIGHTS = ('.safetensors', '.pt', '.pth', '.th', '.ckpt', '.bin')  # files, as against hub ids


def existing(path):
    """Returns `path`. Raises UserError if there is no such file."""
    if not os.path.isfile(path):
        raise UserError(f'no file {path}')
    return path


def read_lines(path):
    """The non-empty lines of a text file. Raises UserError if there are none."""
    with open(existing(path), encoding='utf-8') as f:
        lines = [line.strip() for line in f if line.strip()]
    if not lines:
        raise UserError(f'{path} is empty')
    return lines


def write_atomically(path, write):
    """Calls write(temporary path) and renames the result: no reader sees a half-written file, and a
    failed write leaves nothing behind."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    tmp = os.path.join(folder, '.tmp-' + name)
    try:
        write(tmp)
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def description(net):
    """The dict that a saved file holds of its network: net.config, or for a network from a user's
    Python file the arguments of its build()."""
    return getattr(net, 'built_as', None) or net.config


def save_model(net, path, diffusion=None, **more):
    """Writes a self-describing safetensors file: the weights, and in its header, as JSON, the
    description that rebuilds the network, `diffusion.config`, and `more`: `vae`, the pipeline whose
    VAE decodes the latents; `pipeline`, the pipeline with the text encoders and the scheduler of a
    diffusers network; `guided`, whether guidance is already distilled into the predictions;
    `sampling`, the sampler settings. Raises UserError if a weight is not finite.
    """
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
    """(state dict, header dict) of a .safetensors or a torch file. Code in a file is never run."""
    if existing(path).endswith('.safetensors'):
        with safe_open(path, 'pt') as f:
            header = json.loads((f.metadata() or {}).get('config', '{}'))
            return {k: f.get_tensor(k) for k in f.keys()}, header
    return torch.load(path, map_location='cpu', weights_only=True), {}


def is_plain(spec):
    """Whether `spec` is a file of weights without a description of their network."""
    return os.path.isfile(spec) and not spec.endswith('.py') and not read_weights(spec)[1]


def unwrap(state, path):
    """The tensors of a checkpoint, without the dicts and prefixes in which trainers, EMAs,
    DataParallel and torch.compile wrap them. Raises UserError if it holds anything else."""
    wrappers = (
        'ema', 'params_ema', 'ema_state_dict', 'state_dict', 'model_state_dict', 'model', 'net',
        'params'
    )
    for name in wrappers * 2:
        if isinstance(state.get(name), dict):
            state = state[name]
    state = {k: v for k, v in state.items() if k != 'n_averaged'}
    odd = [k for k, v in state.items() if not torch.is_tensor(v)]
    if odd or not state:
        raise UserError(
            f'{path} holds more than the tensors of one network: {list(state)[:9]}. Save only '
            "the network you mean: torch.save(checkpoint['NAME'], ...)"
        )
    for prefix in ('module.', '_orig_mod.', 'model.') * 2:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


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
    if odd:
        raise UserError(f'{path} does not fit: {len(odd)} parameters differ, the first is {odd[0]}')
    for k, v in state.items():
        if v.is_floating_point() and not v.isfinite().all():
            raise UserError(f'{path}: its {k} is not finite')
    net.load_state_dict(state)
    return net


def frozen(net):
    return net.eval().requires_grad_(False)


def digest(net):
    """Eight hexadecimal digits that name a network's weights."""
    data = hashlib.sha256()
    for v in net.state_dict().values():
        data.update(v.detach().cpu().flatten().view(torch.uint8).numpy())
    return data.hexdigest()[:8]


def make(config):
    """Builds the network of a `net.config` or of a file's header, with random weights."""
    config = dict(config)
    kind = config.pop('class')
    ours = {c.__name__: c for c in DENOISERS.values()} | {'LVAE': LVAE, 'classifier': classifier}
    if kind in ours:
        return ours[kind](**config)
    if kind not in PIPELINE_NETWORKS:
        raise UserError(f'no network {kind!r}')
    import diffusers

    config.pop('image_size', None)
    return Pipeline(getattr(diffusers, kind)(**config))


# ==== the user's Python files: they are named on the command line, and run
def split_file(spec):
    """Splits 'my.py:weights.pt' into ('my.py', 'weights.pt') and 'my.py' into ('my.py', '');
    anything else gives ('', spec)."""
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


def function_of(path, name):
    """The function `name` of a user's Python file. Raises UserError if the file has none."""
    module = run_file(path)
    if not hasattr(module, name):
        raise UserError(f'{path} has no {name}(): a teacher has load(), a student build()')
    return getattr(module, name)


def build_from_file(path, **kw):
    """The network that build(**kw) in a user's file returns; `built_as` records the call."""
    net = function_of(path, 'build')(**kw)
    net.built_as = {'class': 'file', 'file': os.path.basename(path)} | kw
    for name in ('num_classes', 'in_channels', 'image_size'):
        if name in kw and not hasattr(net, name):
            setattr(net, name, kw[name])
    return net


def load_from_file(path, weights):
    """(net, header) of a user's file: the result of its load(); or, if `weights` are given, the
    network of its build() with these weights."""
    if not weights:
        return function_of(path, 'load')(), {}
    state, header = read_weights(weights)
    kw = {k: v for k, v in header.get('net', {}).items() if k not in ('class', 'file')}
    state = state if header else unwrap(state, weights)
    return load_state(build_from_file(path, **kw), state, weights), header


def read_model(spec):
    """(state, header) of a file of weights whose network is not defined in a user's Python file."""
    state, header = read_weights(spec)
    net = header.get('net', {})
    if net.get('class') == 'file':
        raise UserError(
            f"{spec}: its network is defined in {net['file']}, which runs only if you name it: "
            f"{net['file']}:{spec}"
        )
    return state, header


# ==== diffusers

PIPELINE_NETWORKS = (
    'UNet2DModel', 'UNet2DConditionModel', 'DiTTransformer2DModel', 'SD3Transformer2DModel'
)
# parts of diffusers pipelines that are not loaded
UNUSED = ('safety_checker', 'feature_extractor', 'image_encoder', 'watermarker')


class Shared(dict):
    """Tensors shared by a network and its copies: not copied by EMA, not sent by DDP."""

    def __deepcopy__(self, memo):
        return self


class Pipeline(nn.Module):
    """A network of diffusers behind the interface of ours: x (B, C, H, W) of latents or pixels, t
    (B,), y (B,).

    `condition` is '', 'class' or 'text'. y indexes the classes, or the texts given to
    `set_prompts`; -1 is the null condition. `source` is the folder or hub id of its pipeline,
    `pipe` the pipeline while its text encoders are needed; `shared` holds the embedded texts.
    Raises UserError for a network that is not supported.
    """

    def __init__(self, net, pipe=None):
        super().__init__()
        kind = type(net).__name__
        c = getattr(net, 'config', {})
        if kind not in PIPELINE_NETWORKS:
            raise UserError(f"a {kind} is not supported; {', '.join(PIPELINE_NETWORKS)} are")
        known = dict(
            class_embed_type=None, addition_embed_type='text', encoder_hid_dim_type='text_proj',
            time_cond_proj_dim=None
        )
        for key, supported in known.items():
            if c.get(key) not in (None, supported):
                raise UserError(
                    f'this {kind} takes a condition that is not supported: {key}={c[key]!r}'
                )
        out_channels = c.get('out_channels') or c.in_channels
        if out_channels not in (c.in_channels, 2 * c.in_channels):
            raise UserError(
                f'this {kind} predicts {out_channels} channels from {c.in_channels}: it takes an '
                'image as its condition (super-resolution, inpainting), which is not supported'
            )
        self.net = net
        self.pipe = pipe
        self.source = ''
        self.shared = Shared()
        self.register_buffer('times', None, persistent=False)  # the network's own time for each t
        for m in net.modules():
            # DiT: in train mode it would drop labels, independently in each layer
            if type(m).__name__ == 'LabelEmbedding':
                m.dropout_prob = 0.0
        classes = max(0, (c.get('num_class_embeds') or 0) - 1)
        self.num_classes = c.get('num_embeds_ada_norm') or classes
        takes_text = 'encoder_hidden_states' in inspect.signature(net.forward).parameters
        self.condition = 'class' if self.num_classes else ''
        if takes_text:
            self.condition = 'text'
        self.image_size = c.sample_size
        self.in_channels = c.in_channels
        self.config = {k: v for k, v in c.items() if not k.startswith('_')}
        self.config |= {'class': kind, 'image_size': c.sample_size, 'out_channels': out_channels}

    def set_prompts(self, prompts):
        """Embeds the texts with all text encoders of the pipeline, and then frees the encoders."""
        if self.pipe is None:  # load the text encoders only
            self.pipe, _ = open_pipeline(
                self.source, self.net.dtype, unet=self.net, transformer=self.net, vae=None
            )
        for name in ('text_encoder', 'text_encoder_2', 'text_encoder_3'):
            if getattr(self.pipe, name, None) is not None:
                getattr(self.pipe, name).to(self.net.device)
        embedded = self.embed([*prompts, ''])  # the last one, -1, is the null condition
        self.shared |= {k: v.to(self.net.device, self.net.dtype) for k, v in embedded.items()}
        self.num_classes = len(prompts)
        self.pipe = None

    @torch.no_grad()
    def embed(self, texts):
        """{'prompts': (N, L, D)} of N texts, and 'pooled' (N, D) if the pipeline has it; on the
        CPU."""
        parts = {}
        encode = self.pipe.encode_prompt
        kw = dict(
            device=self.net.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        for name in {'prompt_2', 'prompt_3'} & inspect.signature(encode).parameters.keys():
            kw[name] = None  # every encoder gets the same text
        for i in range(0, len(texts), 256):
            outputs = encode(prompt=texts[i : i + 256], **kw)[::2]  # skip the negative prompts
            for name, out in zip(('prompts', 'pooled'), outputs):
                parts.setdefault(name, []).append(out.cpu())
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def forward(self, x, t, y=None):
        y = torch.full_like(t, -1) if y is None else y
        kw = {}
        if self.condition == 'class':
            kw['class_labels'] = torch.where(y < 0, self.num_classes, y)
        elif self.condition == 'text':
            kw['encoder_hidden_states'] = self.shared['prompts'][y].to(self.net.dtype)
            if 'pooled' in self.shared:
                kw['pooled_projections'] = self.shared['pooled'][y].to(self.net.dtype)
        t = t if self.times is None else self.times[t]
        return self.net(x.to(self.net.dtype), timestep=t, **kw).sample.float()


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
    """Sets `net.vae` without registering it as a submodule, so that it is not trained or saved."""
    net.__dict__['vae'] = frozen(vae) if vae is not None else None


def read_pipeline(spec):
    """(folder, model_index.json as a dict) of a diffusers pipeline, local or on the hub. Raises
    UserError if it contains code."""
    path = os.path.join(spec, 'model_index.json')
    if not os.path.isdir(spec):
        import huggingface_hub

        with local_rank_0_first():
            path = huggingface_hub.hf_hub_download(spec, 'model_index.json')
    with open(path) as f:
        parts = json.load(f)
    # older versions of diffusers always run the code in a folder; newer ones only if asked to
    code = glob.glob(f'{glob.escape(spec)}/*/*.py') + glob.glob(f'{glob.escape(spec)}/None.py')
    for name, part in parts.items():
        known = part[0] in (None, 'diffusers', 'transformers') if isinstance(part, list) else True
        if not known and name not in UNUSED:
            code.append(part[0])
    if code:
        raise UserError(f'{spec} contains code ({code[0]}); pipelines with code are not loaded')
    return os.path.dirname(path), parts


def from_pretrained(kind, spec, **kw):
    """kind.from_pretrained; if there are only half-precision files, it loads those."""
    with local_rank_0_first():
        try:
            return kind.from_pretrained(spec, low_cpu_mem_usage=False, **kw)
        except (OSError, ValueError) as e:
            try:
                return kind.from_pretrained(spec, variant='fp16', low_cpu_mem_usage=False, **kw)
            except (OSError, ValueError):
                raise e


def open_pipeline(spec, dtype, **given):
    """(the pipeline, its model_index.json) of a folder or hub id; the parts in `given` replace
    those on disk, which are not loaded."""
    from diffusers import DiffusionPipeline

    _, parts = read_pipeline(spec)
    given = {k: v for k, v in (dict.fromkeys(UNUSED) | given).items() if k in parts}
    return from_pretrained(DiffusionPipeline, spec, **given).to(dtype), parts


def load_part(spec, *names):
    """The first of the named parts that a pipeline has; a VAE or a scheduler."""
    import diffusers

    root, parts = read_pipeline(spec)
    name = next((n for n in names if parts.get(n, [None])[0]), None)
    kind = parts[name][1] if name else ''
    if not re.fullmatch('Autoencoder.*|VQModel|.*Scheduler', kind):
        raise UserError(
            f"{spec} has no {' or '.join(names)} of a diffusers class (found: {kind or 'none'})"
        )
    return from_pretrained(
        getattr(diffusers, kind), root if os.path.isdir(spec) else spec, subfolder=name
    )


# ==== Loaders: denoisers


def refuse_known(spec, known):
    """Raises UserError if settings are given for a model that needs none, and would ignore them."""
    if known:
        raise UserError(f"{spec} says itself what it is: leave out {', '.join(known)}")


def load_denoiser(spec, dtype=torch.float32, **known):
    """(net, diffusion) from one string; the network is in eval mode and frozen.

    spec: a file of ours (.safetensors); an original ADM, DDPM-IP, Improved DDPM, DKDM, LDM or DiT
        checkpoint (.pt, .ckpt, .safetensors), whose architecture follows from its shapes; a
        diffusers folder or hub id; or a user's Python file, whose load() returns both, or
        `my.py:weights.safetensors`, whose build() makes the network.
    dtype: of the weights of a diffusers pipeline (`pick_dtype`); all others are float32, and
        `cast_frozen` can cast them.
    known: what an original checkpoint does not record, where the defaults (which are printed) are
        wrong: image_size, num_head_channels or num_heads, use_new_attention_order,
        rescale_timesteps, schedule, steps, beta_range, prediction, clip, and any other argument of
        the network.
    Raises UserError if it is not a denoiser, or if it needs inputs other than x_t, t and y.
    """
    file, weights = split_file(spec)
    hub_id = spec.count('/') == 1 and not spec.endswith(WEIGHTS) and not os.path.exists(spec)
    header = {}
    if file or hub_id or os.path.isdir(spec):
        refuse_known(spec, known)
    if file:
        net, header = load_from_file(file, weights)
        if weights and 'diffusion' not in header:
            raise UserError(
                f'{weights} does not record its diffusion process; give {file} a load() that '
                'returns (net, diffusion)'
            )
        net, diffusion = (net, Diffusion(**header['diffusion'])) if weights else net
    elif os.path.isdir(spec) or hub_id:
        net, diffusion = load_pipeline(spec, dtype)
    else:
        state, header = read_model(spec)
        if header and 'diffusion' not in header:
            raise UserError(
                f"{spec} is not a denoiser but a {header.get('net', {}).get('class', 'model')}"
            )
        if header:
            refuse_known(spec, known)
            net = load_state(make(header['net']), state, spec)
            diffusion = Diffusion(**header['diffusion'])
        else:
            net, diffusion = load_original(spec, state, known)
    if header:
        net.guided = header.get('guided', False)  # guidance is distilled into it
        net.sampling = header.get('sampling', {})
        net.source = header.get('pipeline') or header.get('vae', '')
        if header.get('vae'):
            attach_vae(net, load_part(header['vae'], 'vae', 'vqvae'))
        if isinstance(net, Pipeline):
            net.to(dtype)
    match_times(net, diffusion)
    return frozen(net), diffusion


def match_times(net, diffusion):
    """On a flow, sets the time that a diffusers network is given for t: b_t T, as in SD3."""
    if isinstance(net, Pipeline) and diffusion.config['schedule'] == 'flow':
        net.times = (diffusion.b[:-1] * diffusion.T).float().to(next(net.parameters()).device)


def load_pipeline(spec, dtype):
    """(net, diffusion) of a diffusers folder or hub id; the process is that of its scheduler."""
    pipe, parts = open_pipeline(spec, dtype)
    scheduler = pipe.scheduler
    process = scheduler.config
    network = getattr(pipe, 'unet', None) or getattr(pipe, 'transformer', None)
    net = Pipeline(network, pipe if 'text_encoder' in parts else None)
    if net.config.get('num_class_embeds') is not None:
        raise UserError(f'{spec}: class-conditional {type(network).__name__}s are not supported')
    net.source = os.path.abspath(spec) if os.path.isdir(spec) else spec
    net.guided = parts.get('_guided', False)  # export.py writes this
    attach_vae(net, getattr(pipe, 'vae', None) or getattr(pipe, 'vqvae', None))
    unsupported = (
        'use_dynamic_shifting', 'shift_terminal', 'invert_sigmas', 'use_karras_sigmas',
        'use_exponential_sigmas', 'use_beta_sigmas'
    )
    if type(scheduler).__name__ == 'FlowMatchEulerDiscreteScheduler' and not any(
        process.get(k) for k in unsupported
    ):
        steps, shift = process.num_train_timesteps, process.shift
        return net, Diffusion('flow', steps, 'flow', learn_sigma=False, clip=False, shift=shift)
    predictions = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x0'}
    prediction = predictions.get(process.get('prediction_type'))
    scaled = process.get('thresholding')  # for DeepFloyd IF, clamping x_0 replaces it
    if (
        prediction is None
        or not hasattr(scheduler, 'betas')
        or scaled
        and type(pipe).__name__ != 'IFPipeline'
    ):
        raise UserError(
            f'{spec}: its {type(scheduler).__name__} is not supported: it must have betas and a '
            'prediction_type, and no thresholding; or be flow matching with a fixed shift'
        )
    learn_sigma = net.config['out_channels'] == 2 * net.in_channels
    clip = bool(process.get('clip_sample') or scaled)
    return net, Diffusion(
        scheduler.betas.tolist(), prediction=prediction, learn_sigma=learn_sigma, clip=clip
    )


def assume(spec, assumed, known):
    """Prints the values that are assumed because a file does not record them."""
    rows = [f'{k}={v!r}' for k, v in assumed.items() if k not in known]
    if rows and rank_and_world()[0] == 0:
        print(
            f"{spec} does not say {', '.join(rows)}: assumed; "
            'teacher_config, prior_config or model_config changes it'
        )


def count_blocks(state, prefix):
    """How many blocks `prefix`0, `prefix`1, ... there are among the names of a state dict."""
    return 1 + max(int(k.split('.')[1]) for k in state if k.startswith(prefix))


def load_original(spec, state, known):
    """(net, diffusion) of an original checkpoint. The shapes give its architecture, except the
    image size, the number of heads, the order of qkv and the process. LDM keeps the network, its
    EMA (which is used) and the autoencoder in one dict."""
    inner = state.get('state_dict', state)
    betas = inner.get('betas')
    names = [k.removeprefix('model.') for k in inner if k.startswith('model.diffusion_model.')]
    if names:
        state = {
            k.removeprefix('diffusion_model.'): inner.get(
                'model_ema.' + k.replace('.', ''), inner['model.' + k]
            )
            for k in names
        }
    else:
        state = unwrap(state, spec)
    if 'x_embedder.proj.weight' in state:
        read, assumed, process = read_dit(state)
        kind = DiT
    elif 'input_blocks.0.0.weight' in state and any(k.startswith('output_blocks.') for k in state):
        read, assumed, process = read_unet(state, betas, known)
        kind = UNet
    else:
        raise UserError(
            f'{spec} is not a denoiser of a known kind: it has no keys of a U-Net (input_blocks... '
            f'and output_blocks...) or a DiT (x_embedder...), but {list(state)[:3]}; a Python file '
            'with load() can be a teacher all the same'
        )
    outputs = read.get('out_channels', read['in_channels'])
    upscales = read['in_channels'] == 6 and 'in_channels' not in known
    if outputs not in (read['in_channels'], 2 * read['in_channels']) or upscales:
        raise UserError(
            f"{spec} predicts {outputs} channels from {read['in_channels']}: it takes an image as "
            "its condition (super-resolution, inpainting), which is not supported"
        )
    said = dict(known)
    if said.pop('rescale_timesteps', False):
        said['time_scale'] = 1000 / said.get('steps', 1000)
    if 'num_heads' in said and kind is UNet:
        said.setdefault('num_head_channels', -1)
    for k in process.keys() & said.keys() | {'steps', 'beta_range'} & said.keys():
        process[k] = said.pop(k)
    odd = said.keys() - inspect.signature(kind).parameters.keys()
    if odd:
        raise UserError(f'{spec}: a {kind.__name__} and its process have no {min(odd)!r}')
    # the shapes give learn_sigma, so it is not listed as assumed
    assume(spec, assumed | process | {'steps': 1000}, known | {'learn_sigma': 0})
    net = load_state(kind(**read | assumed | said), state, spec)
    return net, Diffusion(**process)


def read_dit(state):
    """(arguments that the shapes of a DiT give, assumed arguments, arguments of Diffusion)."""
    hidden, channels, patch, _ = state['x_embedder.proj.weight'].shape
    learn_sigma = len(state['final_layer.linear.bias']) == 2 * channels * patch**2
    table = state.get('y_embedder.embedding_table.weight')
    read = dict(
        patch_size=patch, in_channels=channels, hidden_size=hidden,
        depth=count_blocks(state, 'blocks.'),
        image_size=patch * math.isqrt(state['pos_embed'].shape[1]), learn_sigma=learn_sigma,
        mlp_ratio=state['blocks.0.mlp.fc1.weight'].shape[0] / hidden,
        num_classes=0 if table is None else len(table) - 1
    )
    assumed = dict(num_heads=hidden // (72 if hidden == 1152 else 64))
    return (
        read, assumed,
        dict(schedule='linear', prediction='eps', learn_sigma=learn_sigma, clip=False)
    )


def read_unet(state, betas, known):
    """The same for a U-Net of ADM, Improved DDPM or LDM."""
    outputs = count_blocks(state, 'output_blocks.')
    width = state['time_embed.0.weight'].shape[1]
    # the first output block with an upsampling ends a level, which has `blocks` + 1 of them
    ups = []
    for k in state:
        parts = k.split('.')
        if (
            parts[0] == 'output_blocks'
            and parts[2] != '0'
            and k.endswith(('.in_layers.0.weight', '.conv.weight'))
        ):
            ups.append(int(parts[1]))
    blocks = min(ups, default=outputs - 1)
    tops = [f'input_blocks.{1 + level * (blocks + 1)}' for level in range(outputs // (blocks + 1))]
    mults = [state[f'{top}.0.out_layers.3.weight'].shape[0] / width for top in tops]
    strided = f'input_blocks.{blocks + 1}.0.op.weight' in state
    latent = strided and betas is not None
    assumed = dict(
        image_size=64 if latent else 32, num_head_channels=32, use_new_attention_order=not strided
    )
    size = known.get('image_size', assumed['image_size'])
    attention = [size // 2**i for i, top in enumerate(tops) if f'{top}.1.qkv.weight' in state]
    classes = len(state.get('label_emb.weight', ()))
    read = dict(
        in_channels=state['input_blocks.0.0.weight'].shape[1],
        out_channels=len(state['out.2.bias']), model_channels=width, num_res_blocks=blocks,
        resblock_updown=not strided,
        channel_mult=tuple(int(m) if m == int(m) else m for m in mults),
        attention_resolutions=tuple(attention), num_classes=classes,
        use_scale_shift_norm=len(state[f'{tops[0]}.0.emb_layers.1.bias']) == 2 * width * mults[0]
    )
    learn_sigma = read['out_channels'] == 2 * read['in_channels']
    process = dict(schedule='cosine', prediction='eps', learn_sigma=learn_sigma, clip=not latent)
    if latent:
        process['schedule'] = betas.tolist()
    return read, assumed, process


# ==== Loaders: classifiers and VAEs

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR10 = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def complete_classifier(net):
    """Adds the attributes that a user's classifier lacks: in_channels 3, image_size 0 (any size),
    num_classes the number of its logits."""
    if not hasattr(net, 'in_channels'):
        net.in_channels = 3
    if not hasattr(net, 'image_size'):
        net.image_size = 0
    if not hasattr(net, 'num_classes'):
        side = net.image_size or 32
        with torch.no_grad():
            net.num_classes = net.eval()(torch.zeros(1, net.in_channels, side, side)).shape[1]
    return net


def forward_features(net, x):
    """(logits, [last map (B, C, h, w) of each stage]) of a classifier that has a method of this
    name, or a list `net.stages` of the names of the layers that end its stages. Raises UserError if
    it has neither."""
    if hasattr(net, 'forward_features'):
        return net.forward_features(x)
    if not hasattr(net, 'stages'):
        raise UserError(
            f'this {type(net).__name__} gives no feature maps: add forward_features(x), or '
            'net.stages, the names of the layers that end its stages; or use --lam_msarc=0'
        )
    return hooked_features(net, [net.get_submodule(name) for name in net.stages], x)


def load_classifier(spec, **known):
    """A frozen classifier in eval mode: a file of ours; a state dict (.th, .pt, .pth) of a ResNet,
    Wide ResNet or VGG from common public repositories; torchvision:NAME with its ImageNet
    weights (downloaded); or a user's Python file.

    known: what a state dict does not record and the defaults (which are printed) get wrong:
    image_size, mean, std (of images in [0, 1]), max_pool. Raises UserError.
    """
    file, weights = split_file(spec)
    if file:
        refuse_known(spec, known)
        return complete_classifier(frozen(load_from_file(file, weights)[0]))
    if spec.startswith('torchvision:'):
        from torchvision.models import get_model_weights

        weights = get_model_weights(spec.partition(':')[2]).DEFAULT
        usual = weights.transforms()
        usual = dict(image_size=usual.crop_size[0], mean=usual.mean, std=usual.std) | known
        net = classifier(spec, len(weights.meta['categories']), **usual, weights=weights)
        del net.config['weights']
        return frozen(net)
    state, header = read_model(spec)
    if header:
        if header.get('net', {}).get('class') != 'classifier':
            raise UserError(
                f"{spec} is not a classifier but a {header.get('net', {}).get('class', 'model')}"
            )
        refuse_known(spec, known)
        return frozen(load_state(make(header['net']), state, spec))

    state = unwrap(state, spec)
    blocks = sum(k.endswith('.conv1.weight') for k in state)
    first, head = 'conv1', 'fc' if 'fc.bias' in state else 'linear'
    read = {}
    assumed = dict(image_size=32) | CIFAR10
    if 'block1.layer.0.conv1.weight' in state:
        name = f"wrn{2 * blocks + 4}_{state['fc.weight'].shape[1] // 64}"
    elif 'block4.0.weight' in state:
        name = f'vgg{sum(v.dim() == 4 for v in state.values()) + 3}'
        first, head = 'block0.0', 'classifier'
    elif 'layer4.0.conv1.weight' in state:
        depth = {8: 18, 16: 50 if 'layer1.0.conv3.weight' in state else 34}.get(blocks)
        if state['conv1.weight'].shape[2] == 7:
            name = f'torchvision:resnet{depth}'
            assumed = dict(image_size=224) | IMAGENET
        else:
            name = f'resnet{depth}'
            read['width'] = len(state['conv1.weight'])
            assumed['max_pool'] = False
    elif 'layer1.0.conv1.weight' in state:
        name = f'resnet{2 * blocks + 2}'
        read['width'] = len(state['conv1.weight'])
        read['shortcut'] = 'conv' if 'layer2.0.downsample.0.weight' in state else 'pad'
        assumed |= IMAGENET
    else:
        raise UserError(
            f'{spec} is not a classifier of a known kind: it has no keys of a ResNet (layer1...), '
            f'Wide ResNet (block1.layer...) or VGG (block0...), but {list(state)[:3]}; a Python '
            'file with load() can be a teacher all the same'
        )
    read |= dict(
        num_classes=len(state[f'{head}.bias']), in_channels=state[f'{first}.weight'].shape[1]
    )
    odd = known.keys() - assumed.keys() - read.keys()
    if odd:
        raise UserError(f'{spec}: a classifier has no {min(odd)!r}; it has ' + ', '.join(assumed))
    assume(spec, assumed, known)
    net = classifier(name, **read | assumed | known)
    if isinstance(net, Torchvision):
        state = {f'net.{k}': v for k, v in state.items()}
    elif net.head_name == 'fc':
        state = {k.replace('linear.', 'fc.'): v for k, v in state.items()}
    elif net.head_name == 'linear':  # timm's names
        state = {
            re.sub('^fc[.]', 'linear.', k).replace('.downsample.', '.shortcut.'): v
            for k, v in state.items()
        }
    return frozen(load_state(net, state, spec))


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL or AutoencoderTiny behind the interface of LVAE: images in [0, 1],
    one level, and no noise (std 0) where the class has no posterior."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.in_channels = net.config.in_channels
        self.image_size = 0  # any
        self.config = {k: v for k, v in net.config.items() if not k.startswith('_')} | {
            'class': type(net).__name__
        }

    def encode(self, x):
        """[(mean, std)] of the latents (B, C, h, w)."""
        found = self.net.encode(x * 2 - 1)
        if hasattr(found, 'latent_dist'):
            return [(found.latent_dist.mean.float(), found.latent_dist.std.float())]
        return [(found.latents.float(), torch.zeros_like(found.latents.float()))]

    def decode(self, noise, seen):
        """(out (B, C, H, W), q, p) of latents mean + std noise."""
        ((mean, std),) = seen
        out = (self.net.decode(mean + std * noise[0]).sample.float() + 1) / 2
        return out, seen, [(torch.zeros_like(mean), torch.ones_like(std))]

    def forward(self, x, noise):
        return self.decode(noise, self.encode(x))


def check_image_range(net, spec):
    """Raises UserError if the images of a user's generator do not lie in its `image_range`."""
    low, high = getattr(net, 'image_range', (0, 1))
    slack = (high - low) / 4  # an output without bounds exceeds its range a little
    with torch.no_grad():
        images = net.decode(net.noise(16))
    images = images if torch.is_tensor(images) else images[0]
    outside = (images < low - slack) | (images > high + slack)
    if outside.float().mean() > 0.05:
        raise UserError(
            f'{spec}: the images have values from {images.min():.2f} to {images.max():.2f}, but '
            f'the image_range of the network is {low, high}'
        )


def load_vae(spec):
    """A frozen VAE or generator in eval mode: an LVAE of ours (.safetensors); diffusers'
    AutoencoderKL or AutoencoderTiny as a folder or hub id, alone or in a pipeline; or a
    user's Python file. Raises UserError for anything else."""
    file, weights = split_file(spec)
    if file:
        net = frozen(load_from_file(file, weights)[0])
        if not weights:
            check_image_range(net, spec)
        return net
    if spec.endswith(WEIGHTS):
        state, header = read_model(spec)
        if header.get('net', {}).get('class') != 'LVAE':
            raise UserError(
                f"{spec} is not a VAE but a {header.get('net', {}).get('class', 'model')}"
            )
        return frozen(load_state(make(header['net']), state, spec))
    import diffusers

    try:
        kind = diffusers.AutoencoderKL.load_config(spec).get('_class_name')
    except OSError:  # no config.json: a pipeline
        kind = None
    net = load_part(spec, 'vae') if kind is None else None
    if kind in ('AutoencoderKL', 'AutoencoderTiny'):  # others may run code
        net = from_pretrained(getattr(diffusers, kind), spec)
    if type(net).__name__ not in ('AutoencoderKL', 'AutoencoderTiny'):
        raise UserError(f'{spec} is no AutoencoderKL or AutoencoderTiny of diffusers')
    return frozen(Autoencoder(net.float()))


# ==== Images


def torchvision_dataset(name):
    """The class of a torchvision dataset (mnist, cifar10, ...), None for other names."""
    from torchvision import datasets

    names = {n.lower(): n for n in datasets.__all__}
    return getattr(datasets, names[name.lower()]) if name.lower() in names else None


def split_classes(spec):
    """Splits 'mnist:0-4' into ('mnist', range(0, 5)), the classes 0 to 4; without such an ending,
    or if `spec` is an existing path, (spec, None)."""
    match = re.fullmatch(r'(.+):(\d+)-(\d+)', spec)
    if os.path.exists(spec) or not match:
        return spec, None
    path = match[1]
    low, high = int(match[2]), int(match[3])
    if not os.path.exists(path) and not torchvision_dataset(path):
        return spec, None
    if low > high:
        raise UserError(f'{spec}: in NAME:a-b, a must not be greater than b')
    return path, range(low, high + 1)


def shards_of(spec):
    """The .npz files that a string for `load_images` names."""
    path, _ = split_classes(spec)
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), '**', '*.npz'), recursive=True))
    return [path] if path.endswith('.npz') else []


def load_images(spec, train=True, image_size=0, channels=0):
    """(images uint8 (N, C, H, W), labels int64 (N,) or None) from one string.

    spec: an ADM-style .npz (`arr_0` uint8 NHWC, `arr_1` labels); a folder of such shards; a folder
        of images, in one subfolder per class or none, or Tiny-ImageNet's `val`; a .txt of lines
        `file label`, the files relative to its folder (DomainNet's lists); or a torchvision dataset
        (mnist, cifar10, ...), downloaded to ./data; `train` picks the split. A suffix `:a-b`
        keeps only the classes a to b.
    image_size: the central square of every image is resized to it; 0 for neither. channels: 1 or 3
    converts the images; 0 leaves them. Raises UserError for files that are not images, or whose
    range of values is not known.
    """
    path, classes = split_classes(spec)
    shards = shards_of(spec)
    if shards:
        parts = [load_npz(f) for f in shards]
        if len({p[0].shape[1:] for p in parts}) > 1 or len({p[1] is None for p in parts}) > 1:
            raise UserError(f'{spec}: its shards differ in image size, channels or labels')
        images = torch.cat([p[0] for p in parts])
        labels = None if parts[0][1] is None else torch.cat([p[1] for p in parts])
    else:
        found = []
        labels = []
        for image, label in open_images(path, train):
            if classes is None or label is None or label in classes:
                found.append(resize_images(image[None], image_size))
                labels.append(label)
        if not found:
            raise UserError(f'no images in {spec}')
        if len({i.shape[2:] for i in found}) > 1:
            raise UserError(
                f'{spec}: its images differ in size ({tuple(found[0].shape[2:])} and others); set '
                '--image_size, or resize them first if the script has no such key'
            )
        most = max(i.shape[1] for i in found)  # grey only if all images are grey
        images = torch.cat([i.expand(-1, most, -1, -1) for i in found])
        labels = torch.tensor(labels) if isinstance(labels[0], int) else None
    if classes:
        if labels is None:
            raise UserError(f'{spec} has no labels to choose classes by')
        chosen = (labels >= classes[0]) & (labels <= classes[-1])
        if not chosen.any():
            raise UserError(f'{spec} has no images of the classes {classes[0]} to {classes[-1]}')
        images, labels = images[chosen], labels[chosen]
    if image_size:
        images = torch.cat([resize_images(i, image_size) for i in images.split(500)])
    if channels == 1 and images.shape[1] == 3:
        print(f'{spec}: colour images are converted to grey')
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        images = torch.cat(
            [(i * weights).sum(1, keepdim=True).round().byte() for i in images.split(500)]
        )
    elif channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images, labels


def load_npz(path):
    with np.load(existing(path), allow_pickle=False) as z:
        images, labels = z['arr_0'], z.get('arr_1')
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"{path}: 'arr_0' must be uint8, N x H x W x C; it is {images.dtype}, {images.shape}"
        )
    if labels is not None:
        if (
            labels.shape != images.shape[:1]
            or labels.dtype.kind not in 'iu'
            or labels.min(initial=0) < 0
        ):
            raise UserError(
                f"{path}: 'arr_1' must be {len(images)} labels from 0, not {labels.dtype}"
            )
        labels = torch.from_numpy(labels.astype(np.int64))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def open_images(spec, train):
    """Pairs (uint8 (C, H, W), label or None) of the files in a folder or list, or of a torchvision
    dataset."""
    from PIL import Image

    if os.path.isdir(spec) or spec.endswith('.txt'):
        for file, label in image_files(spec):
            with Image.open(file) as image:
                yield to_tensor(image, file), label
        return
    dataset = torchvision_dataset(spec)
    if dataset is None:
        raise UserError(
            f'no images at {spec!r}: an .npz, a folder, or a torchvision dataset such as mnist or '
            'cifar10'
        )
    split = {'split': 'train' if train else 'test'}
    if 'train' in inspect.signature(dataset).parameters:
        split = {'train': train}
    with local_rank_0_first():
        pairs = dataset('data', download=True, **split)
    for image, label in pairs:
        yield to_tensor(image, spec), label


def image_files(spec):
    """[(file, label or None)] of a .txt of lines `file label`, or of a folder. Hidden files and
    folders are skipped."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if spec.endswith('.txt'):
        rows = [line.rsplit(' ', 1) for line in read_lines(spec)]
        if any(len(row) < 2 or not row[1].isdecimal() for row in rows):
            raise UserError(f'{spec}: every line must be a file and a label')
        return [(os.path.join(os.path.dirname(spec), file), int(label)) for file, label in rows]
    notes = os.path.join(spec, 'val_annotations.txt')
    # Tiny-ImageNet's: file, class and box; classes are numbered as the folders of `train`
    if os.path.exists(notes):
        rows = [line.split('\t') for line in read_lines(notes)]
        names = sorted({row[1] for row in rows})
        return [(os.path.join(spec, 'images', row[0]), names.index(row[1])) for row in rows]
    classes = {}
    for folder, folders, names in os.walk(spec):
        folders[:] = sorted(f for f in folders if not f.startswith(('.', '__MACOSX')))
        name = os.path.relpath(folder, spec).split(os.sep)[0]
        found = classes.setdefault(name, [])
        for file in sorted(names):
            if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith('.'):
                found.append(os.path.join(folder, file))
    alone = classes.pop('.')
    empty = [name for name, files in classes.items() if not files]
    classes = {name: files for name, files in classes.items() if files}
    if alone and classes:
        raise UserError(
            f'{spec} holds both images ({len(alone)}) and folders of images ({min(classes)}, ...): '
            'keep one kind only'
        )
    if classes and empty:
        print(f"{spec}: {', '.join(empty)}: no images; not counted as classes")
    pairs = [(file, None) for file in alone]
    for label, files in enumerate(classes.values()):
        pairs += [(file, label) for file in files]
    return pairs


def to_tensor(image, name):
    """A PIL image as uint8 (C, H, W), C 1 or 3: rotated by its EXIF tag, transparency on white,
    16-bit grey divided by 65,535, floats taken to be in [0, 1], CMYK and palettes as RGB, palettes
    of greys as grey. Raises UserError for other modes, whose range of values is not known."""
    from PIL import Image, ImageOps

    mode, kind = image.mode, image.format
    if getattr(image, 'n_frames', 1) > 1:
        raise UserError(f'{name} holds {image.n_frames} images: one file per image is wanted')
    image = ImageOps.exif_transpose(image)
    if mode.startswith('I;16') or mode == 'I' and kind in ('PNG', 'PPM') or mode == 'F':
        values = np.asarray(image).astype(np.float64) / (1 if mode == 'F' else 65535)
        if not (values.min() >= 0 and values.max() <= 1):  # also false for nan
            raise UserError(f'{name}: its values are floats outside [0, 1]')
        return torch.from_numpy((values * 255).round().astype(np.uint8))[None]
    grey = mode in ('1', 'L', 'LA', 'La')
    if mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        white = Image.new('RGBA', image.size, 'white')
        white.alpha_composite(image.convert('RGBA'))
        image = white
    elif mode not in ('1', 'L', 'P', 'RGB', 'CMYK', 'YCbCr', 'LAB', 'HSV'):
        raise UserError(
            f'{name}: the range of mode {mode!r} ({kind}) is not known; 8 or 16 bit, or float in '
            '[0, 1]'
        )
    values = np.asarray(image.convert('L' if grey else 'RGB'))
    if mode == 'P' and (values == values[:, :, :1]).all():  # a palette of greys
        values = values[:, :, 0]
    return torch.from_numpy(values.copy()).view(*values.shape[:2], -1).permute(2, 0, 1)


def resize_images(images, size):
    """uint8 images (N, C, H, W): the central square, resized to `size`; unchanged if size
    is 0."""
    H, W = images.shape[2:]
    if size == 0 or size == H == W:
        return images
    side = min(H, W)
    top, left = (H - side) // 2, (W - side) // 2
    square = images[:, :, top : top + side, left : left + side]
    return to_uint8(resize(to_float(square), size))


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


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


def read_statistics(path, space):
    """The statistics that eval_fid.py or ADM stored for a set of images: 'mu', 'sigma', perhaps
    'mu_s', 'sigma_s', 'n'; None if the file holds images. Raises UserError for statistics of
    another feature space."""
    with np.load(existing(path), allow_pickle=False) as z:
        arrays = dict(z)
    if 'mu' not in arrays:
        return None
    named = str(arrays.pop('space', 'inception'))  # ADM's files do not name theirs
    if named != space:
        raise UserError(
            f'{path} holds statistics in the feature space {named!r}, not {space!r}; make new ones '
            'with eval_fid.py --save_stats'
        )
    names = ('mu', 'sigma', 'mu_s', 'sigma_s', 'n')
    return {k: torch.from_numpy(arrays[k]).double() for k in names if k in arrays}


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, Eq. (6)),
    and whether sigma1 sigma2 is near singular. Its eigenvalues are computed as those of the
    symmetric sigma1^(1/2) sigma2 sigma1^(1/2)."""
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ sigma2 @ root)
    distance = (
        ((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2).trace() - 2 * product.clamp(min=0).sqrt().sum()
    )
    return float(distance), bool(product[0] < 1e-14 * product[-1])


# ==== Running: ranks, devices, signals


def rank_and_world():
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def init_distributed(device='auto', dtype='auto', seed=0):
    """(device, autocast, rank, world) of this process, alone or under torchrun (NCCL on GPUs, gloo
    on CPUs). autocast is a context for the networks' forward passes: bfloat16 or none."""
    rank, world = rank_and_world()
    if device == 'auto':
        device = 'mps' if torch.backends.mps.is_available() else 'cpu'
        if torch.cuda.is_available():
            device = 'cuda'
    device = torch.device(device)
    if device.type == 'cuda':
        local = int(os.environ.get('LOCAL_RANK', 0))
        device = torch.device('cuda', local if world > 1 or device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # the first convolution reads x_t in float32
    if world > 1 and not dist.is_initialized():
        # CPU tensors go through gloo, so that all_reduce_max does not wait for the GPU. The timeout
        # is hours long, since one rank may work alone (downloads, pictures). The prefix keeps a
        # restarted run from reading the addresses of dead ranks in the store, where it would hang.
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
    """The number of images in one forward pass on one rank. Raises UserError if it is not a whole
    number."""
    if batch_size % (world * grad_accum):
        raise UserError(
            f'batch_size={batch_size} must be a multiple of {world} ranks x {grad_accum} '
            'accumulation steps'
        )
    return batch_size // world // grad_accum


def pick_dtype(device, dtype='auto'):
    """The dtype that networks compute in: `dtype` itself, or for 'auto' bfloat16 where the hardware
    computes in it, else float16 on GPUs (only for frozen pipelines: there is no loss scaling) and
    float32 on CPUs."""
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
    """Casts the convolutions and linear layers of a frozen network to bfloat16 once, which autocast
    would do in every call; except `first_layer`, which reads x_t in float32. Only networks with
    `castable = True` are cast."""
    if dtype == torch.bfloat16 and getattr(net, 'castable', False):
        first = set(net.first_layer.modules()) if hasattr(net, 'first_layer') else set()
        for m in set(net.modules()) - first:
            if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                m.to(dtype)
    return net


def memory_format(device):
    """channels_last on GPUs, where convolutions are faster with it; on CPUs they are slower."""
    return torch.channels_last if device.type == 'cuda' else torch.contiguous_format


def all_reduce_max(value=0):
    """The maximum of `value` over all ranks. The ranks wait for each other here, but not for their
    GPUs. On a single rank, `value` itself."""
    if not dist.is_initialized():
        return value
    value = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


@contextlib.contextmanager
def local_rank_0_first():
    """Local rank 0 runs the block first (a download); the node's other ranks follow."""
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
    """`signal` is 0 until Ctrl-C or SIGTERM, then the signal's number; the loop then saves and
    leaves. Inside `with flag.interrupts():` the signal also ends the block, which is meant for
    work that may be lost, such as pictures."""

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
    """Ends the script with exit code 0, or with 128 + the number of the signal that stopped it."""
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
    'wandb', 'any_teacher'
)


def lasting(settings):
    return {k: v for k, v in settings.items() if k not in MAY_CHANGE} | {
        'ranks': rank_and_world()[1]
    }


def lock_out_dir(out_dir, rank):
    """Creates out_dir and locks it until this process ends. Raises UserError if another run holds
    the lock."""
    import fcntl  # not on Windows

    os.makedirs(out_dir, exist_ok=True)
    taken = False
    # a bare file descriptor: it stays open until the process ends
    lock = os.open(os.path.join(out_dir, '.lock'), os.O_RDWR | os.O_CREAT)
    if rank == 0:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(lock, 0)
            os.write(lock, f'process {os.getpid()} on {os.uname().nodename}'.encode())
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            pass
    if all_reduce_max(taken):
        raise UserError(
            f'{out_dir} belongs to a run that has not ended, {os.read(lock, 99).decode()}: use '
            'another --out_dir'
        )


def save_checkpoint(settings, step, net, opt, shared, own, rank):
    """Writes `shared`, the state of all ranks (on rank 0), and `own`, the state of this rank, to
    which it adds the random generators. A run that is killed at any moment leaves a complete
    checkpoint: `ckpt.pt` names the step, and is renamed into place after all ranks have written."""
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
            'settings': lasting(settings)
        }
        write_atomically(os.path.join(out_dir, 'ckpt.pt'), lambda tmp: torch.save(shared, tmp))
    all_reduce_max()
    for f in os.listdir(out_dir):
        if f.startswith(('ckpt_', '.tmp-ckpt_')) and f.endswith(f'_rank{rank}.pt') and f != mine:
            os.remove(os.path.join(out_dir, f))


def resume(settings, rank, net):
    """(shared, own) of the checkpoint that a run resumes from, with its weights already in `net`.
    None for a new run: then older checkpoints are removed, and `net` gets the weights of
    `init_from`, if that is a file. Locks out_dir."""
    out_dir, init_from, teacher = (settings[k] for k in ('out_dir', 'init_from', 'teacher'))
    for name in ('student.safetensors', 'best.safetensors', 'student'):
        if os.path.realpath(teacher) == os.path.realpath(os.path.join(out_dir, name)):
            raise UserError(
                f'teacher={teacher} would be overwritten by its student: use another --out_dir'
            )
    if init_from not in ('scratch', 'resume'):
        state, header = read_weights(init_from)
        load_state(net, state if header else unwrap(state, init_from), init_from)
    lock_out_dir(out_dir, rank)
    # a restart by torchrun --max-restarts resumes, whatever init_from says
    if init_from != 'resume' and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        if rank == 0:
            for name in ('ckpt.pt', 'ckpt_*_rank*.pt'):
                for f in glob.glob(os.path.join(glob.escape(out_dir), name)):
                    os.remove(f)
                    print(f'removed {f} of an earlier run')
        return None
    found = os.path.exists(os.path.join(out_dir, 'ckpt.pt'))
    if found != all_reduce_max(found):
        raise UserError(f'out_dir={out_dir} must be a folder that all ranks share')
    if not found:
        if rank == 0:
            print(f'{out_dir} has no checkpoint yet: starting from the beginning')
        return None
    shared, _ = read_weights(os.path.join(out_dir, 'ckpt.pt'))
    for k, v in lasting(settings).items():
        if shared['settings'].get(k) != v:
            raise UserError(
                f"{out_dir} holds a run with {k}={shared['settings'].get(k)!r}, not {v!r}: use "
                "that run's settings, or another --out_dir"
            )
    own, _ = read_weights(os.path.join(out_dir, f"ckpt_{shared['step']}_rank{rank}.pt"))
    net.load_state_dict(shared['net'])
    return shared, own


def restore(checkpoint, opt):
    """Restores the optimiser and this rank's random generators; called right before the loop."""
    shared, own = checkpoint
    opt.load_state_dict(shared['opt'])
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
