"""
Students that begin as their teacher: a copy of its network, one with LoRA adapters, or a smaller
one of its family that takes over the tensors that fit.

    python few_steps.py --student=teacher --student_prediction=teacher
    python few_steps.py --student=unet.json --init_from=teacher
    python few_steps.py config/few_steps_sd15_lora.py --prompts=texts.txt

LoRA is for pipelines with texts (Stable Diffusion, SDXL, SD3), and needs peft: pip install peft.
"""
import copy
import re

import torch
import torch.nn as nn

import models as M

hub = M.adapter('hub')

# the layers that get an adapter: of U-Nets those of LCM-LoRA (Luo et al. 2023), and the same of
# SD3's transformer
LORA_LAYERS = [
    'to_q', 'to_k', 'to_v', 'to_out.0', 'proj_in', 'proj_out', 'net.0.proj', 'net.2', 'conv1',
    'conv2', 'conv_shortcut', 'downsamplers.0.conv', 'upsamplers.0.conv', 'time_emb_proj',
    'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out'
]


def weights_below(net):
    """What a deep copy takes over and does not copy: all tensors but those of adapters."""
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return {id(p): p for name, p in tensors if 'lora_' not in name}


def share(net):
    """A copy of a network that shares its tensors, except those of adapters. A layer that is
    replaced in one of them is not replaced in the other."""
    return copy.deepcopy(net, weights_below(net))


def begin(spec, known, net_T, config, prediction, learn_sigma):
    """The student of --student=teacher: a copy of the teacher, or where config has a `lora_rank`
    adapters of it. `gradient_checkpointing` saves memory in networks of diffusers and costs time.
    Raises UserError for other entries."""
    choices = {'lora_rank': 0, 'gradient_checkpointing': False}
    odd = config.keys() - choices
    M.check(
        not odd,
        f"student_config: a copy of the teacher has no {min(odd, default='')!r}; it has "
        f"{' and '.join(choices)}"
    )
    choices |= config
    if choices['lora_rank']:
        net = add_lora(spec, net_T, choices['lora_rank'])
    else:
        net = copy_of_teacher(spec, known, net_T, prediction, learn_sigma)
    if choices['gradient_checkpointing']:
        M.check(isinstance(net, hub.Pipeline), f'gradient_checkpointing: {spec} is no pipeline')
        net.net.enable_gradient_checkpointing()
    return net


# ==== a copy ====
def copy_of_teacher(spec, known, net_T, prediction, learn_sigma):
    """The teacher's network with its weights, in float32, to be trained. `tell` lets it make the
    wanted predictions. Raises UserError where its last layer is not known."""
    net, diffusion = M.load_denoiser(spec, torch.float32, **known)
    M.attach_vae(net, None)
    if hasattr(net_T, 'shared'):  # a pipeline's embedded texts
        net.shared = net_T.shared
        net.num_classes = net_T.num_classes
    net.requires_grad_(True)
    if isinstance(net, M.DiT):
        net.pos_embed.requires_grad_(False)  # a fixed table
    return tell(net, spec, diffusion, prediction, learn_sigma)


def tell(net, spec, diffusion, prediction, learn_sigma):
    """Lets a network of the process `diffusion` make another prediction, by its last layer: as v is
    -x_0 at t = T-1, the layer is negated between 'v' and 'x0', and begins at zero between others.
    Rows of a variance are dropped, or begin at zero. Returns the network. Raises UserError where
    the last layer is not known."""
    if prediction == diffusion.prediction and learn_sigma == diffusion.learn_sigma:
        return net
    factor = 1.0
    if prediction != diffusion.prediction:
        factor = -1.0 if {prediction, diffusion.prediction} == {'v', 'x0'} else 0.0
    M.check(
        hasattr(net, 'last_layer'),
        f'{spec}: the last layer of a {type(net).__name__} is not known, so a copy predicts what '
        'it predicts: --student_prediction=teacher, and learn_sigma as it has'
    )
    change_outputs(net, factor, learn_sigma)
    return net


@torch.no_grad()
def change_outputs(net, factor, learn_sigma):
    """Multiplies the rows of a network's last layer that predict by `factor`, and lets it predict
    its variance or not; new rows begin at zero. `net.last_layer` is (layer, number of channels,
    whether the channels are the first index of its rows)."""
    layer, channels, first = net.last_layer
    C = net.in_channels
    wanted = 2 * C if learn_sigma else C
    for name in ('weight', 'bias'):
        old = getattr(layer, name)
        rows = old.unflatten(0, (channels, -1) if first else (-1, channels))
        rows = rows if first else rows.transpose(0, 1)
        new = rows.new_zeros(wanted, *rows.shape[1:])
        kept = min(wanted, channels)
        new[:kept] = rows[:kept]
        new[:C] *= factor
        new = new if first else new.transpose(0, 1)
        setattr(layer, name, nn.Parameter(new.flatten(0, 1).contiguous()))
    net.predict_channels(wanted)


# ==== tensors that fit ====
def stages(net):
    """{name: tensor} of a network, where the blocks of a `UNet` are numbered within their stage, as
    those of diffusers are: 'input_blocks.5.0.x' becomes 'input_blocks.1.2.0.x'."""
    named = dict(net.state_dict())
    if not isinstance(net, M.UNet):
        return named
    blocks = net.config['num_res_blocks']

    def renamed(found):
        side, k = found[1], int(found[2])
        if side == 'output':
            stage, j = divmod(k, blocks + 1)
            return f'output_blocks.{stage}.{j}'
        stage, j = divmod(k - 1, blocks + 1)
        alone = k == 0 or j == blocks  # the first convolution, or a downsampling
        return f'input_blocks.{stage}.alone' if alone else f'input_blocks.{stage}.{j}'

    pattern = r'^(input|output)_blocks\.(\d+)'
    return {re.sub(pattern, renamed, name): value for name, value in named.items()}


def lengths(names):
    """{prefix: number of modules} of every list of modules in the names of tensors."""
    found = {}
    for name in names:
        parts = name.split('.')
        for i, part in enumerate(parts):
            if part.isdigit():
                prefix = '.'.join(parts[:i])
                found[prefix] = max(found.get(prefix, 0), int(part) + 1)
    return found


def lender(name, ours, theirs):
    """The teacher's name for a student's tensor. ours, theirs: the `lengths` of both. Where the
    student's list of blocks is shorter, its first and last block are the teacher's first and last,
    and those between them are spread evenly; a single block is the first."""
    parts = name.split('.')
    found = []
    for i, part in enumerate(parts):
        if part.isdigit():
            n, m = ours['.'.join(parts[:i])], theirs.get('.'.join(found), 0)
            if n < m:
                part = str(round(int(part) * (m - 1) / max(1, n - 1)))
        found.append(part)
    return '.'.join(found)


@torch.no_grad()
def lend(net_T, prediction_T, net, diffusion):
    """Copies every tensor of the teacher that fits the student: of the same name, but for the
    blocks of a deeper teacher (`lender`), and of the same shape. Prints how many of the student's
    parameters began so."""
    C = net.in_channels
    diffusion_T = copy.copy(diffusion)
    diffusion_T.prediction = prediction_T
    if hasattr(net_T, 'last_layer'):
        diffusion_T.learn_sigma = net_T.last_layer[1] == 2 * C
        net_T = tell(share(net_T), '', diffusion_T, diffusion.prediction, diffusion.learn_sigma)
    student, teacher = stages(net), stages(net_T)
    ours, theirs = lengths(student), lengths(teacher)
    copied = 0
    for name, value in student.items():
        source = teacher.get(lender(name, ours, theirs))
        if source is not None and source.shape == value.shape:
            value.copy_(source)
            copied += value.numel()
    total = sum(value.numel() for value in student.values())
    M.check(copied, '--init_from=teacher: no tensor of the teacher fits the student')
    if M.rank_and_world()[0] == 0:
        print(f'{copied / total:.0%} of the student, {copied:,} numbers, begin as in the teacher')


# ==== LoRA ====
class Lora(hub.Pipeline):
    """The network of a pipeline, `base`, with adapters of peft, which begin at zero. It shares the
    weights of `base`. Its parameters and its state are those of the adapters alone, in float32 and
    under the names that `load_lora_weights` of diffusers reads."""

    def __init__(self, base, rank):
        from peft import LoraConfig

        super().__init__(share(base.net))
        self.source = base.source
        self.shared = base.shared
        self.num_classes = base.num_classes
        self.part = 'unet' if base.config['class'].startswith('UNet') else 'transformer'
        self.config |= {'class': 'Lora', 'adapter': 'from_teacher'}
        self.config |= {'pipeline': base.source, 'lora_rank': rank}
        self.net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS))
        for p in self.parameters():
            p.data = p.data.float()

    def named_parameters(self, *args, **kw):
        for name, p in super().named_parameters(*args, **kw):
            if 'lora_' in name:
                yield name, p

    def state_dict(self, *args, **kw):
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.net)
        return {f'{self.part}.{name}': value for name, value in state.items()}

    def load_state_dict(self, state, *args, **kw):
        from peft import set_peft_model_state_dict

        own = {name.removeprefix(self.part + '.'): value for name, value in state.items()}
        set_peft_model_state_dict(self.net, own)

    def __deepcopy__(self, memo):
        """Adapters are copied, the weights below them are shared."""
        memo.update(weights_below(self.net))
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def add_lora(spec, net_T, rank):
    """A student that is its teacher with adapters. Raises UserError for teachers that diffusers
    loads no LoRA for, or if there is no peft."""
    M.check(
        getattr(net_T, 'condition', '') == 'text',
        f'lora_rank is for pipelines with texts, such as Stable Diffusion; {spec} is none'
    )
    try:
        return Lora(net_T, rank)
    except ImportError as e:
        raise M.UserError(f'lora_rank needs peft: pip install peft ({e})') from e


def build(class_name, config):
    """The LoRA of a file's header: its pipeline, with adapters that have random weights."""
    M.check(class_name == 'Lora', f'no network {class_name!r}')
    net, _ = hub.load_denoiser(config['pipeline'], image_size=config['image_size'])
    return Lora(net, config['lora_rank'])
