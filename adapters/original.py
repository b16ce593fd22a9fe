"""
Published checkpoints: denoisers of ADM, DDPM-IP, Improved DDPM, DKDM, LDM and DiT, state dicts of
ResNets, Wide ResNets and VGGs, and torchvision's classifiers. The scripts call this file for every
file of weights that does not describe itself:

    python dkdm.py --teacher=cifar10_32.pt
    # short for --teacher=adapters/original.py:cifar10_32.pt

The shapes of the tensors give the architecture. What they do not give is assumed, printed, and
changed by teacher_config, prior_config or model_config. This file is also the example to copy for
another family of checkpoints: read the state dict, build the network, return (net, diffusion).
"""
import inspect
import math
import re

import torch

import models as M

def say(line):
    if M.rank_and_world()[0] == 0:
        print(line)


def assume(spec, assumed, known, doubt=''):
    """Prints the values that are assumed because a file does not record them."""
    rows = [f'{k}={v!r}' for k, v in assumed.items() if k not in known]
    if rows or doubt:
        say(
            f"{spec} does not say {', '.join(rows) or 'more'}: assumed; teacher_config, "
            f'prior_config or model_config changes it{doubt}'
        )


def tensors_of(spec):
    """The dict that a file of weights holds. Raises UserError for anything else."""
    state, _ = M.read_weights(spec)
    M.check(isinstance(state, dict), f'{spec} holds a {type(state).__name__}, not named tensors')
    return state


def count_blocks(state, prefix):
    """How many blocks `prefix`0, `prefix`1, ... there are among the names of a state dict."""
    numbers = [int(k.split('.')[1]) for k in state if k.startswith(prefix)]
    if not numbers:
        raise KeyError(prefix + '0')
    return 1 + max(numbers)


# what trainers call a network's averaged weights, which are those that are published, and its raw
# ones
AVERAGED = (
    'ema', 'model_ema', 'ema_model', 'state_dict_ema', 'params_ema', 'ema_state_dict', 'ema_params',
    'ema_model_state_dict', 'model_ema_state_dict', 'ema_net', 'net_ema', 'G_ema', 'shadow_params'
)
RAW = ('state_dict', 'model_state_dict', 'model', 'net_model', 'net', 'params', 'online_model')


def below(state, name):
    """The tensors whose names begin with `name` and a dot, without this beginning."""
    return {k.removeprefix(name + '.'): v for k, v in state.items() if k.startswith(name + '.')}


def unwrap(state, path):
    """The tensors of a checkpoint, without the dicts and prefixes in which trainers, EMAs,
    DataParallel and torch.compile wrap them. Where it holds averaged weights beside the raw ones,
    they are taken, and a line says so. Raises UserError if it holds anything else."""
    held = [name for name in AVERAGED + RAW if isinstance(state.get(name), (dict, list))]
    if held:
        averaged = [name for name in held if name in AVERAGED]
        raw = [name for name in held if name in RAW]
        found = state[held[0]]
        if averaged and raw:
            say(f'{path}: the averaged weights, {averaged[0]!r}, were taken, not {raw[0]!r}')
        if 'shadow_params' in found:  # of torch_ema, and of EMAModel of diffusers
            found = found['shadow_params']
        if isinstance(found, dict):
            return unwrap(found, path)
        M.check(raw, f'{path}: its {held[0]!r} is a list of tensors without names')
        return named(found, unwrap(state[raw[0]], path), path)
    state = {k: v for k, v in state.items() if k != 'n_averaged'}
    odd = [k for k, v in state.items() if not torch.is_tensor(v)]
    if odd or not state:
        raise M.UserError(
            f'{path} holds more than the tensors of one network: {list(state)[:9]}. Save only '
            "the network you mean: torch.save(checkpoint['NAME'], ...)"
        )
    for averaged in AVERAGED:  # both in one dict, as 'ema_model.conv1.weight'
        for raw in RAW:
            mean = below(state, averaged)
            names = below(state, raw).keys()
            if names and names <= mean.keys():
                say(f'{path}: the averaged weights, {averaged!r}, were taken, not {raw!r}')
                return {k: mean[k] for k in names}
    for prefix in ('module.', '_orig_mod.', 'model.') * 2:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def named(averages, state, path):
    """A state dict with its parameters replaced by a list of averages in the same order, in which
    buffers and parameters that are not trained are missing. Raises UserError if they do not fit."""
    left = list(averages)
    found = {}
    for k, v in state.items():
        buffer = k.endswith(('running_mean', 'running_var', 'num_batches_tracked'))
        if left and not buffer and left[0].shape == v.shape:
            v = left.pop(0)
        found[k] = v
    M.check(not left, f'{path}: its list of averaged weights does not fit its state dict')
    return found


# ==== denoisers
def load_denoiser(spec, **known):
    """(net, diffusion) of an original checkpoint. The shapes give its architecture, except the
    image size, the number of heads, the order of qkv and the process. LDM keeps the network, its
    EMA (which is used) and the autoencoder in one dict.

    known: what the shapes do not give, where the defaults are wrong: image_size, num_head_channels
    or num_heads, use_new_attention_order, rescale_timesteps, schedule, steps, beta_range,
    prediction, clip, and any other argument of the network; kind='sit' for a SiT, whose tensors are
    named as those of a DiT; null_class, whether the last row of the table of labels is the null
    condition. Raises UserError.
    """
    state = tensors_of(spec)
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
    try:
        if 'x_embedder.proj.weight' in state:
            kind = SiT if known.get('kind') == 'sit' else M.DiT
            read, assumed, process = read_dit(state, kind)
        else:
            kind = M.UNet
            read, assumed, process = read_unet(state, betas, known)
    except (KeyError, ValueError) as e:  # also of relatives: LightningDiT, PixArt, encoders
        raise M.UserError(
            f'{spec} is not a denoiser of a known kind, a U-Net of ADM (input_blocks... and '
            f'output_blocks...) or a DiT (x_embedder...): it lacks {e} and has '
            f'{list(state)[:3]}; a Python file with load() can be a teacher all the same'
        ) from e
    said = dict(known)
    if kind is not M.UNet:
        stated = said.pop('kind', '')
        M.check(
            stated in ('dit', 'sit') or stated == '' and 'flow' not in said.values(),
            f"{spec}: a SiT is kind='sit', without more, as its time runs from noise to image; a "
            "flow with time from image to noise is kind='dit', schedule='flow', prediction='flow'"
        )
    if 'null_class' in assumed:
        state = dict(state)
        with_null = said.pop('null_class', assumed['null_class'])
        read['num_classes'] = set_null_class(state, kind, with_null)
    outputs = read.get('out_channels', read['in_channels'])
    upscales = read['in_channels'] == 6 and 'in_channels' not in known
    if outputs not in (read['in_channels'], 2 * read['in_channels']) or upscales:
        raise M.UserError(
            f"{spec} predicts {outputs} channels from {read['in_channels']}: it takes an image as "
            "its condition (super-resolution, inpainting), which is not supported"
        )
    if said.pop('rescale_timesteps', False):
        said['time_scale'] = 1000 / said.get('steps', 1000)
    if 'num_heads' in said and kind is M.UNet:
        said.setdefault('num_head_channels', -1)
    for k in process.keys() & said.keys() | {'steps', 'beta_range'} & said.keys():
        process[k] = said.pop(k)
    takes = inspect.signature(M.UNet if kind is M.UNet else M.DiT).parameters
    odd = said.keys() - takes.keys()
    if odd:
        raise M.UserError(f'{spec}: a {kind.__name__} and its process have no {min(odd)!r}')
    null_class = known.get('null_class', assumed.get('null_class'))
    own = {k: v for k, v in assumed.items() if k not in ('kind', 'null_class')}
    net = M.load_state(kind(**read | own | said), state, spec)
    net.no_null = null_class is False
    diffusion = M.Diffusion(**process)
    # the shapes give learn_sigma, so it is not listed as assumed
    assume(
        spec, assumed | process | {'steps': 1000}, known | {'learn_sigma': 0},
        doubt_of(net, diffusion)
    )
    return net, diffusion


@torch.no_grad()
def doubt_of(net, diffusion):
    """Words for a network that is perhaps of another kind: where x_t is noise, a prediction of eps
    is that noise. '' if it is."""
    if diffusion.prediction != 'eps':
        return ''
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, net.in_channels, net.image_size, net.image_size, generator=g)
    t = torch.tensor([diffusion.T - 1])
    out = net.eval()(x, t, 0 * t if net.num_classes else None)[:, : net.in_channels]
    like = torch.cosine_similarity(out.flatten(), x.flatten(), dim=0).item()
    if like > 0.8:
        return ''
    return (
        f'. DOUBTFUL: at t={diffusion.T - 1} it should predict the noise that it sees, but the '
        f'correlation is {like:.2f}. EDM and consistency models have the names of ADM, SiT those '
        'of DiT: see docs/reference.md, Wrappers for other processes'
    )


def set_null_class(state, kind, null_class):
    """Brings a table of labels into the form of our networks, where a U-Net has no row for the null
    condition and a DiT a last one; returns the number of classes. A U-Net adds the null row to the
    embedding of t and takes it off the others, which is the same; a DiT that has none gets the mean
    of its rows."""
    if kind is M.UNet and null_class:
        table = state['label_emb.weight']
        state['label_emb.weight'] = table[:-1] - table[-1]
        state['time_embed.2.bias'] = state['time_embed.2.bias'] + table[-1]
        return len(table) - 1
    if kind is M.UNet:
        return len(state['label_emb.weight'])
    name = 'y_embedder.embedding_table.weight'
    if not null_class:
        state[name] = torch.cat([state[name], state[name].mean(0, keepdim=True)])
    return len(state[name]) - 1


class SiT(M.DiT):
    """A SiT (Ma et al. 2024), which is a DiT but for its time, from 0, noise, to 1, the image, and
    for what it predicts, x_0 - eps; behind the interface of ours."""

    def __init__(self, **kw):
        super().__init__(**kw)
        self.config |= {'class': 'SiT', 'adapter': 'original'}
        self.register_buffer('times', None, persistent=False)  # the network's own time for each t

    def set_process(self, diffusion):
        self.times = (1 - diffusion.b[:-1]).float().to(self.pos_embed.device)

    def forward(self, x, t, y=None):
        y = torch.full_like(t, -1) if y is None else y
        return -super().forward(x, self.times[t], y)[:, : self.in_channels]


def build(kind, config):
    """A SiT with random weights, of a config."""
    M.check(kind == 'SiT', f'no network {kind!r}')
    return SiT(**config)


def read_dit(state, kind):
    """(arguments that the shapes of a DiT give, assumed arguments, arguments of Diffusion)."""
    hidden, channels, patch, _ = state['x_embedder.proj.weight'].shape
    learn_sigma = len(state['final_layer.linear.bias']) == 2 * channels * patch**2
    table = state.get('y_embedder.embedding_table.weight')
    read = dict(
        patch_size=patch, in_channels=channels, hidden_size=hidden,
        depth=count_blocks(state, 'blocks.'),
        image_size=patch * math.isqrt(state['pos_embed'].shape[1]), learn_sigma=learn_sigma,
        mlp_ratio=state['blocks.0.mlp.fc1.weight'].shape[0] / hidden, num_classes=0
    )
    assumed = dict(kind='dit', num_heads=hidden // (72 if hidden == 1152 else 64))
    if table is not None:  # 1000 rows are 1000 classes; 1001 have a null class
        assumed['null_class'] = len(table) % 10 != 0
    process = dict(schedule='linear', prediction='eps', learn_sigma=learn_sigma, clip=False)
    if kind is SiT:
        process = dict(schedule='flow', prediction='flow', learn_sigma=False, clip=False)
    return read, assumed, process


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
    if 'label_emb.weight' in state:  # ADM has no null class; some of its kind have 1001 rows
        rows = len(state['label_emb.weight'])
        assumed['null_class'] = rows > 1 and rows % 10 == 1
    read = dict(
        in_channels=state['input_blocks.0.0.weight'].shape[1],
        out_channels=len(state['out.2.bias']), model_channels=width, num_res_blocks=blocks,
        resblock_updown=not strided,
        channel_mult=tuple(int(m) if m == int(m) else m for m in mults),
        attention_resolutions=tuple(attention), num_classes=0,
        use_scale_shift_norm=len(state[f'{tops[0]}.0.emb_layers.1.bias']) == 2 * width * mults[0]
    )
    learn_sigma = read['out_channels'] == 2 * read['in_channels']
    process = dict(schedule='cosine', prediction='eps', learn_sigma=learn_sigma, clip=not latent)
    if latent:
        process['schedule'] = betas.tolist()
    return read, assumed, process


# ==== classifiers
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR10 = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def load_torchvision(spec, **known):
    """torchvision:NAME with its ImageNet weights, which are downloaded."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(spec.partition(':')[2]).DEFAULT
    usual = weights.transforms()
    usual = dict(image_size=usual.crop_size[0], mean=usual.mean, std=usual.std) | known
    net = M.classifier(spec, len(weights.meta['categories']), **usual, weights=weights)
    del net.config['weights']
    return net


def load_classifier(spec, **known):
    """A classifier: a state dict (.th, .pt, .pth) of a ResNet, Wide ResNet or VGG from common
    public repositories, or torchvision:NAME.

    known: what a state dict does not record, where the defaults are wrong: image_size, mean, std
    (of images in [0, 1]), max_pool. Raises UserError.
    """
    if spec.startswith('torchvision:'):
        return load_torchvision(spec, **known)
    state = unwrap(tensors_of(spec), spec)
    try:
        name, found, assumed = read_classifier(state)
    except KeyError as e:
        raise M.UserError(
            f'{spec} is not a classifier of a known kind, a ResNet (layer1...), Wide ResNet '
            f'(block1.layer...) or VGG (block0...): it lacks {e} and has {list(state)[:3]}; a '
            'Python file with load() can be a teacher all the same'
        ) from e
    odd = known.keys() - assumed.keys() - found.keys()
    if odd:
        raise M.UserError(f'{spec}: a classifier has no {min(odd)!r}; it has ' + ', '.join(assumed))
    assume(spec, assumed, known)
    net = M.classifier(name, **found | assumed | known)
    if name.startswith('torchvision:'):
        state = {f'net.{k}': v for k, v in state.items()}
    elif net.head_name == 'fc':
        state = {k.replace('linear.', 'fc.'): v for k, v in state.items()}
    elif net.head_name == 'linear':  # timm's names
        state = {
            re.sub('^fc[.]', 'linear.', k).replace('.downsample.', '.shortcut.'): v
            for k, v in state.items()
        }
    return M.load_state(net, state, spec)


def read_classifier(state):
    """(name, arguments that the shapes give, assumed arguments) of a classifier. Raises KeyError
    for a state dict of another kind."""
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
        depth = {(8, False): 18, (16, False): 34, (16, True): 50}[
            blocks, 'layer1.0.conv3.weight' in state
        ]
        if state['conv1.weight'].shape[2] == 7:
            name = f'torchvision:resnet{depth}'
            assumed = dict(image_size=224) | IMAGENET
        else:
            name = f'resnet{depth}'
            read['width'] = len(state['conv1.weight'])
            assumed['max_pool'] = False
    else:
        name = f'resnet{2 * blocks + 2}'
        read['width'] = len(state['layer1.0.conv1.weight'])
        read['shortcut'] = 'conv' if 'layer2.0.downsample.0.weight' in state else 'pad'
        assumed |= IMAGENET
    read['num_classes'] = len(state[f'{head}.bias'])
    read['in_channels'] = state[f'{first}.weight'].shape[1]
    return name, read, assumed
