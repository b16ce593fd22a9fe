"""
Turns a student into a folder that diffusers loads:
DiffusionPipeline.from_pretrained('out/pipeline') samples from it.

    python export.py --model=out/dkdm_ddpm_cifar10/student.safetensors --out_dir=out/pipeline
    # a folder to give away
    python export.py --model=out/dkdm_ddpm_cifar10/student.safetensors --link=False

A student whose class is that of its teacher's network becomes the teacher's pipeline: the student,
the teacher's scheduler with the student's prediction, and the teacher's other parts (VAE, text
encoders). Any other unconditional UNet2DModel of pixels becomes a DDPMPipeline. Otherwise the
folder holds only network and scheduler, for which diffusers has no pipeline.
Networks of ours become diffusers' UNet2DModel (patch_size=1, not the 2 of plain dkdm.py; channels
in 32) or DiTTransformer2DModel (with classes). A few-step student gets a DDIMScheduler: the
pipeline samples it with num_inference_steps set to its number of jumps.
A LoRA becomes a folder for `pipe.load_lora_weights`, with the scheduler that it needs and a README.
"""
import os

model = ''                   # a student of dkdm.py or few_steps.py, or another file
                             # (adapters/original.py)
model_config = {}            # what an original checkpoint does not record (adapters/original.py)
link = True                  # symbolic links to the teacher's other parts; False: copies
out_dir = 'out/pipeline'     # a new folder, or an empty one
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import json
import shutil
import tempfile
from functools import partial

import diffusers
import torch
import torch.nn.functional as F

import models as M

hub = M.adapter('hub')


# ==== networks of ours as networks of diffusers ====
def copy_layer(old, new, source, target, names=('',)):
    """Copies a layer's weights and bias from one state dict to another; a fused layer is
    split into the layers `target + name`."""
    for kind in ('weight', 'bias'):
        if f'{source}.{kind}' in old:
            w = old[f'{source}.{kind}']
            if w.dim() == 3:  # attention's 1-D convolutions are linear layers in diffusers
                w = w[:, :, 0]
            for name, part in zip(names, w.chunk(len(names))):
                new[f'{target}{name}.{kind}'] = part.clone()


def dit_to_diffusers(net):
    """A DiT with classes as a DiTTransformer2DModel. Outputs agree within about 0.1 %: for the
    frequencies of t, diffusers divides by 127, DiT's authors by 128. Raises UserError for a DiT
    without classes."""
    c = net.config
    if not c['num_classes']:
        raise M.UserError('a DiTTransformer2DModel needs classes, but this DiT has none')
    other = diffusers.DiTTransformer2DModel(
        c['num_heads'], c['hidden_size'] // c['num_heads'], c['in_channels'], net.out_channels,
        c['depth'], sample_size=c['image_size'], patch_size=c['patch_size'],
        num_embeds_ada_norm=c['num_classes'], norm_elementwise_affine=False, norm_eps=1e-6
    )
    new = {}
    copy = partial(copy_layer, net.state_dict(), new)
    copy('x_embedder.proj', 'pos_embed.proj')
    for i in range(c['depth']):
        a, b = f'blocks.{i}.', f'transformer_blocks.{i}.'
        copy('t_embedder.mlp.0', b + 'norm1.emb.timestep_embedder.linear_1')
        copy('t_embedder.mlp.2', b + 'norm1.emb.timestep_embedder.linear_2')
        copy('y_embedder.embedding_table', b + 'norm1.emb.class_embedder.embedding_table')
        copy(a + 'adaLN_modulation.1', b + 'norm1.linear')
        copy(a + 'attn.qkv', b + 'attn1.', ('to_q', 'to_k', 'to_v'))
        copy(a + 'attn.proj', b + 'attn1.to_out.0')
        copy(a + 'mlp.fc1', b + 'ff.net.0.proj')
        copy(a + 'mlp.fc2', b + 'ff.net.2')
    copy('final_layer.adaLN_modulation.1', 'proj_out_1')
    copy('final_layer.linear', 'proj_out_2')
    other.load_state_dict(new, strict=True)
    return other.eval()


def unet_to_diffusers(net):
    """A UNet as a UNet2DModel, with the same outputs. Raises UserError if that class cannot
    represent it: patch_size > 1, channel_mult[0] != 1, channels that are not multiples of 32,
    time_scale != 1, or the old order of attention heads."""
    c = net.config
    old, new = net.state_dict(), {}
    copy = partial(copy_layer, old, new)
    widths = [int(mult * c['model_channels']) for mult in c['channel_mult']]
    blocks = c['num_res_blocks']
    if (
        c['patch_size'] > 1
        or c['channel_mult'][0] != 1
        or any(w % 32 for w in widths)
        or c.get('time_scale', 1) != 1
        or not c['use_new_attention_order']
        or c['num_head_channels'] < 1
    ):
        raise M.UserError(
            'UNet2DModel of diffusers cannot represent this UNet: it needs patch_size=1, '
            'channel_mult[0]=1, multiples of 32 channels, time_scale=1 and the new order of '
            'attention heads'
        )
    attends = [c['image_size'] // 2 ** i in c['attention_resolutions'] for i in range(len(widths))]
    if c['resblock_updown']:
        how, down, up, conv = 'resnet', 'ResnetDownsampleBlock2D', 'ResnetUpsampleBlock2D', ''
    else:
        how, down, up, conv = 'conv', 'DownBlock2D', 'UpBlock2D', '.conv'
    other = diffusers.UNet2DModel(
        c['image_size'], c['in_channels'], c['out_channels'], block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=['AttnDownBlock2D' if a else down for a in attends],
        up_block_types=['AttnUpBlock2D' if a else up for a in attends[::-1]], downsample_type=how,
        upsample_type=how, attention_head_dim=c['num_head_channels'], attn_norm_num_groups=32,
        norm_eps=1e-5, dropout=c['dropout'],
        resnet_time_scale_shift='scale_shift' if c['use_scale_shift_norm'] else 'default',
        freq_shift=0, flip_sin_to_cos=True, downsample_padding=1,
        num_class_embeds=c['num_classes'] + 1 if c['num_classes'] else None
    )

    def layer(source, target):
        if f'{source}.in_layers.0.weight' not in old:  # a convolution
            copy(f'{source}.op' if f'{source}.op.weight' in old else source, target)
            return
        for a, b in (
            ('in_layers.0', 'norm1'),
            ('in_layers.2', 'conv1'),
            ('emb_layers.1', 'time_emb_proj'),
            ('out_layers.0', 'norm2'),
            ('out_layers.3', 'conv2'),
            ('skip_connection', 'conv_shortcut'),
        ):
            copy(f'{source}.{a}', f'{target}.{b}')

    def attention(source, target):
        copy(source + '.norm', target + '.group_norm')
        copy(source + '.qkv', target + '.', ('to_q', 'to_k', 'to_v'))
        copy(source + '.proj_out', target + '.to_out.0')

    copy('time_embed.0', 'time_embedding.linear_1')
    copy('time_embed.2', 'time_embedding.linear_2')
    if c['num_classes']:  # the null condition adds nothing
        new['class_embedding.weight'] = F.pad(old['label_emb.weight'], (0, 0, 0, 1))
    copy('input_blocks.0.0', 'conv_in')
    copy('out.0', 'conv_norm_out')
    copy('out.2', 'conv_out')
    layer('middle_block.0', 'mid_block.resnets.0')
    attention('middle_block.1', 'mid_block.attentions.0')
    layer('middle_block.2', 'mid_block.resnets.1')
    for i in range(len(widths)):
        last = i == len(widths) - 1
        for j in range(blocks):
            source = f'input_blocks.{1 + i * (blocks + 1) + j}'
            layer(source + '.0', f'down_blocks.{i}.resnets.{j}')
            if attends[i]:
                attention(source + '.1', f'down_blocks.{i}.attentions.{j}')
        if not last:
            layer(
                f'input_blocks.{(i + 1) * (blocks + 1)}.0', f'down_blocks.{i}.downsamplers.0{conv}'
            )
        target = f'up_blocks.{i}.'
        for j in range(blocks + 1):
            source = f'output_blocks.{i * (blocks + 1) + j}'
            layer(source + '.0', f'{target}resnets.{j}')
            if attends[::-1][i]:
                attention(source + '.1', f'{target}attentions.{j}')
        if not last:
            source += '.2' if attends[::-1][i] else '.1'
            layer(source + conv, f'{target}upsamplers.0{conv}')
    other.load_state_dict(new, strict=True)
    return other.eval()


def to_diffusers(net):
    """Converts a network of ours to diffusers. Raises UserError if diffusers has no such class."""
    if isinstance(net, hub.Pipeline):
        return net.net
    if isinstance(net, M.DiT):
        return dit_to_diffusers(net)
    if isinstance(net, M.UNet):
        return unet_to_diffusers(net)
    raise M.UserError(
        f'diffusers has no {type(net).__name__}; its weights are plain PyTorch, a state dict in '
        'safetensors'
    )


def make_scheduler(diffusion, sampling, theirs=None, shift=1.0):
    """The diffusers scheduler for a process. If `theirs`, the teacher's scheduler, has the same
    betas, it is kept, with the student's prediction type. `sampling`: the sampler settings
    of a few-step student, which needs DDIM. `shift`: that of `theirs`, if it is of a flow. Raises
    UserError if diffusers has no such process."""
    predictions = {'eps': 'epsilon', 'v': 'v_prediction', 'x0': 'sample'}
    flow = diffusion.config['schedule'] == 'flow'
    if (
        flow
        or diffusion.prediction not in predictions
        or theirs is not None
        and not hasattr(theirs, 'betas')
    ):
        if (
            theirs is None
            or diffusion.prediction != 'flow'
            or shift != diffusion.config['shift']
        ):
            raise M.UserError(
                f'no scheduler of diffusers samples the prediction {diffusion.prediction!r} of '
                "this process; a flow can be exported only into its teacher's flow pipeline"
            )
        return theirs
    betas = M.betas_from_alpha_bar(diffusion.alpha_bar[:-1])
    said = dict(
        num_train_timesteps=diffusion.T, trained_betas=betas.tolist(),
        clip_sample=diffusion.clip > 0, clip_sample_range=diffusion.clip or 1.0,
        prediction_type=predictions[diffusion.prediction]
    )
    if sampling:
        return diffusers.DDIMScheduler(
            timestep_spacing=sampling['spacing'], set_alpha_to_one=True, **said
        )
    if theirs is not None:
        same = len(theirs.betas) == len(betas) and torch.allclose(
            theirs.betas.double(), betas, atol=1e-6
        )
        if same:
            return theirs.from_config(theirs.config, prediction_type=said['prediction_type'])
    variance = 'fixed_large' if diffusion.large_variance else 'fixed_small'
    if diffusion.learn_sigma:
        variance = 'learned_range'
    own = diffusers.DDPMScheduler(variance_type=variance, **said)
    return own if theirs is None else theirs.from_config(own.config)


def save_lora(net, pipeline, folder):
    """Writes pytorch_lora_weights.safetensors for pipelines of this class."""
    layers = {name.removeprefix(net.part + '.'): v for name, v in net.state_dict().items()}
    getattr(diffusers, pipeline).save_lora_weights(folder, **{f'{net.part}_lora_layers': layers})


def how_to_use(spec, folder, scheduler, arguments):
    """The README.md of a LoRA: the lines that sample with it."""
    return f"""```python
from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained({spec!r})
pipe.load_lora_weights({folder!r})
pipe.scheduler = {scheduler}.from_pretrained({folder!r}, subfolder='scheduler')
image = pipe({', '.join(['prompt', *arguments])}).images[0]
```
"""


# ==== the folder, renamed into place once complete ====
if __name__ == '__main__':
    if os.path.isdir(out_dir) and os.listdir(out_dir):
        raise M.UserError(f'out_dir={out_dir} is not empty: use a new folder')
    net, diffusion = M.load_denoiser(model, **model_config)
    network = to_diffusers(net)
    kind = type(network).__name__
    lora = type(net).__name__ == 'Lora'
    spec = getattr(net, 'source', '')  # the teacher's pipeline, if it has one
    root, parts = hub.read_pipeline(spec) if spec else ('', {})
    name = next((k for k in ('unet', 'transformer') if (parts.get(k) or [0, 0])[1] == kind), '')
    others, lost = {}, []  # the teacher's other parts, and those that are missing
    theirs = None
    if name:
        theirs = hub.load_part(spec, 'scheduler')
        if not os.path.isdir(spec) and not lora:  # on the hub: download what is missing
            hub.open_pipeline(spec, torch.float32, **{name: network})
        for k, v in parts.items():
            if isinstance(v, list) and v[0] and k not in (name, 'scheduler'):
                others[k] = os.path.abspath(os.path.join(root, k))
        lost = [k for k, path in others.items() if not os.path.isdir(path)]
        if set(lost) - set(hub.UNUSED) and not lora:
            raise M.UserError(f"{spec} lacks its {', '.join(lost)}")
    sampling = getattr(net, 'sampling', {})
    shift = 1.0
    if hasattr(theirs, 'shift'):
        shift = hub.flow_shift(theirs.config, net)
    scheduler = make_scheduler(diffusion, sampling, theirs, shift)
    # diffusers has a pipeline for the teacher's class, and for any unconditional UNet2DModel of
    # pixels
    plain = kind == 'UNet2DModel' and not net.num_classes and not getattr(net, 'vae', None)
    whole = bool(name) or plain
    if not name:
        name = 'unet' if kind.startswith('UNet') else 'transformer'
        pipeline = 'DDIMPipeline' if sampling else 'DDPMPipeline'
        parts = {
            '_class_name': pipeline,
            '_diffusers_version': diffusers.__version__,
            name: ['diffusers', kind],
        }
    parts['scheduler'] = ['diffusers', type(scheduler).__name__]

    # how the pipeline is called
    arguments = []
    if sampling and diffusion.config['schedule'] == 'flow':
        times = M.sampling_steps(diffusion.T, sampling['steps'])
        arguments.append(f'sigmas={[(t + 1) / diffusion.T for t in times]}')
    elif sampling:
        arguments.append(f"num_inference_steps={sampling['steps']}")
    if getattr(net, 'guided', False) and not plain:  # it would be guided a second time
        arguments.append('guidance_scale=1.0')
    hint = f"; call it with {', '.join(arguments)}" if arguments else ''

    target = os.path.realpath(out_dir)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.tmp-', dir=os.path.dirname(target)) as tmp:
        folder = os.path.join(tmp, 'pipeline')
        scheduler.save_pretrained(os.path.join(folder, 'scheduler'))
        if lora:
            save_lora(net, parts['_class_name'], folder)
            use = how_to_use(spec, out_dir, type(scheduler).__name__, arguments)
            with open(os.path.join(folder, 'README.md'), 'w') as f:
                f.write(use)
        else:
            network.save_pretrained(os.path.join(folder, name))
            for part in others.keys() - lost:
                (os.symlink if link else shutil.copytree)(others[part], os.path.join(folder, part))
        if whole and not lora:
            more = {k: [None, None] for k in lost} | {'_guided': getattr(net, 'guided', False)}
            with open(os.path.join(folder, 'model_index.json'), 'w') as f:
                f.write(json.dumps(parts | more, indent=2) + '\n')
        os.rename(folder, target)
    if lora:
        print(f'{out_dir}: a LoRA{hint}\n{use}')
    elif whole:
        print(
            f"{out_dir}: {parts['_class_name']}, for "
            f'DiffusionPipeline.from_pretrained({out_dir!r}){hint}'
        )
    else:
        print(
            f'{out_dir}: only a {kind} and its scheduler; diffusers has no pipeline for such a '
            'network'
        )
