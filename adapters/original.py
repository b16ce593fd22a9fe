"""
Published checkpoints: denoisers of ADM, DDPM-IP, Improved DDPM, DKDM, LDM and DiT, state dicts of
ResNets, Wide ResNets and VGGs, and torchvision's classifiers. The scripts call this file for every
file of weights that does not describe itself:

    python dkdm.py --teacher=cifar10_32.pt       # short for --teacher=adapters/original.py:cifar10_32.pt

The shapes of the tensors give the architecture. What they do not give is assumed, printed, and
changed by teacher_config, prior_config or model_config. This file is also the example to copy for
another family of checkpoints: read the state dict, build the network, return (net, diffusion).
"""
import inspect
import math
import re

import torch

import models as M

def assume(spec, assumed, known):
    """Prints the values that are assumed because a file does not record them."""
    rows = [f'{k}={v!r}' for k, v in assumed.items() if k not in known]
    if rows and M.rank_and_world()[0] == 0:
        print(
            f"{spec} does not say {', '.join(rows)}: assumed; "
            'teacher_config, prior_config or model_config changes it'
        )


def count_blocks(state, prefix):
    """How many blocks `prefix`0, `prefix`1, ... there are among the names of a state dict."""
    return 1 + max(int(k.split('.')[1]) for k in state if k.startswith(prefix))


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
        raise M.UserError(
            f'{path} holds more than the tensors of one network: {list(state)[:9]}. Save only '
            "the network you mean: torch.save(checkpoint['NAME'], ...)"
        )
    for prefix in ('module.', '_orig_mod.', 'model.') * 2:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


# ==== denoisers
def load_denoiser(spec, **known):
    """(net, diffusion) of an original checkpoint. The shapes give its architecture, except the
    image size, the number of heads, the order of qkv and the process. LDM keeps the network, its
    EMA (which is used) and the autoencoder in one dict.

    known: what the shapes do not give, where the defaults are wrong: image_size, num_head_channels
    or num_heads, use_new_attention_order, rescale_timesteps, schedule, steps, beta_range,
    prediction, clip, and any other argument of the network. Raises UserError.
    """
    state, _ = M.read_weights(spec)
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
        kind = M.DiT
    elif 'input_blocks.0.0.weight' in state and any(k.startswith('output_blocks.') for k in state):
        read, assumed, process = read_unet(state, betas, known)
        kind = M.UNet
    else:
        raise M.UserError(
            f'{spec} is not a denoiser of a known kind: it has no keys of a U-Net (input_blocks... '
            f'and output_blocks...) or a DiT (x_embedder...), but {list(state)[:3]}; a Python file '
            'with load() can be a teacher all the same'
        )
    outputs = read.get('out_channels', read['in_channels'])
    upscales = read['in_channels'] == 6 and 'in_channels' not in known
    if outputs not in (read['in_channels'], 2 * read['in_channels']) or upscales:
        raise M.UserError(
            f"{spec} predicts {outputs} channels from {read['in_channels']}: it takes an image as "
            "its condition (super-resolution, inpainting), which is not supported"
        )
    said = dict(known)
    if said.pop('rescale_timesteps', False):
        said['time_scale'] = 1000 / said.get('steps', 1000)
    if 'num_heads' in said and kind is M.UNet:
        said.setdefault('num_head_channels', -1)
    for k in process.keys() & said.keys() | {'steps', 'beta_range'} & said.keys():
        process[k] = said.pop(k)
    odd = said.keys() - inspect.signature(kind).parameters.keys()
    if odd:
        raise M.UserError(f'{spec}: a {kind.__name__} and its process have no {min(odd)!r}')
    # the shapes give learn_sigma, so it is not listed as assumed
    assume(spec, assumed | process | {'steps': 1000}, known | {'learn_sigma': 0})
    net = M.load_state(kind(**read | assumed | said), state, spec)
    return net, M.Diffusion(**process)


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
    state, _ = M.read_weights(spec)
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
        raise M.UserError(
            f'{spec} is not a classifier of a known kind: it has no keys of a ResNet (layer1...), '
            f'Wide ResNet (block1.layer...) or VGG (block0...), but {list(state)[:3]}; a Python '
            'file with load() can be a teacher all the same'
        )
    read |= dict(
        num_classes=len(state[f'{head}.bias']), in_channels=state[f'{first}.weight'].shape[1]
    )
    odd = known.keys() - assumed.keys() - read.keys()
    if odd:
        raise M.UserError(f'{spec}: a classifier has no {min(odd)!r}; it has ' + ', '.join(assumed))
    assume(spec, assumed, known)
    net = M.classifier(name, **read | assumed | known)
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
