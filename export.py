"""
Turns a student into a folder that diffusers loads: DiffusionPipeline.from_pretrained('out/pipeline') samples from it.

    python export.py --model=out/dkdm/student.safetensors --out_dir=out/pipeline
    python export.py --model=out/dkdm/student.safetensors --link=False      # a folder to give away

A student whose class is that of its teacher's network becomes the teacher's pipeline: the student, the teacher's
scheduler with the student's prediction, and the teacher's other parts (VAE, text encoders). Any other UNet2DModel of
pixels without condition becomes a DDPMPipeline. No pipeline samples from the rest: network and scheduler alone.
Networks of ours become diffusers' UNet2DModel (patch_size=1, channels in 32) or DiTTransformer2DModel (with classes).
"""
import os

model = 'out/dkdm/student.safetensors'  # a student of dkdm.py, or another file of a denoiser (models.load_denoiser)
link = True                  # the teacher's other parts are links to where they are; False: copies
out_dir = 'out/pipeline'     # a new folder, or an empty one
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import json
import shutil
import tempfile

import diffusers
import torch
import torch.nn.functional as F

import models as M


# ---- networks of ours as networks of diffusers ----
def to_diffusers(net):
    """A UNet as a UNet2DModel (the same outputs), a DiT with classes as a DiTTransformer2DModel (outputs within about
    0.1 %: diffusers spaces the frequencies of t by 127 steps where DiT's authors have 128).

    Raises ValueError where the class does not fit: patch_size, channel_mult[0] != 1 or channels that are no multiples
    of 32 of a UNet; a DiT without classes.
    """
    c, old, new = net.config, net.state_dict(), {}

    def copy(source, target, *names):
        """Weights and biases; a layer of several outputs is cut into its targets."""
        for kind in ('weight', 'bias'):
            if f'{source}.{kind}' in old:
                w = old[f'{source}.{kind}']
                w = w[:, :, 0] if w.dim() == 3 else w          # attention's 1-D convolutions are linear there
                for name, part in zip(names or [''], w.chunk(len(names) or 1)):
                    new[f'{target}{name}.{kind}'] = part.clone()
    if c['class'] == 'DiT':
        if not c['num_classes']:
            raise ValueError(f'{model}: DiTTransformer2DModel has classes, this DiT has none')
        other = diffusers.DiTTransformer2DModel(
            c['num_heads'], c['hidden_size'] // c['num_heads'], c['in_channels'], net.out_channels, c['depth'],
            sample_size=c['image_size'], patch_size=c['patch_size'], num_embeds_ada_norm=c['num_classes'],
            norm_elementwise_affine=False, norm_eps=1e-6)
        copy('x_embedder.proj', 'pos_embed.proj')
        for i in range(c['depth']):
            a, b = f'blocks.{i}.', f'transformer_blocks.{i}.'
            copy('t_embedder.mlp.0', b + 'norm1.emb.timestep_embedder.linear_1')
            copy('t_embedder.mlp.2', b + 'norm1.emb.timestep_embedder.linear_2')
            copy('y_embedder.embedding_table', b + 'norm1.emb.class_embedder.embedding_table')
            copy(a + 'adaLN_modulation.1', b + 'norm1.linear')
            copy(a + 'attn.qkv', b + 'attn1.', 'to_q', 'to_k', 'to_v')
            copy(a + 'attn.proj', b + 'attn1.to_out.0')
            copy(a + 'mlp.fc1', b + 'ff.net.0.proj')
            copy(a + 'mlp.fc2', b + 'ff.net.2')
        copy('final_layer.adaLN_modulation.1', 'proj_out_1')
        copy('final_layer.linear', 'proj_out_2')
    else:
        widths, n = [int(mult * c['model_channels']) for mult in c['channel_mult']], c['num_res_blocks']
        if c['patch_size'] > 1 or c['channel_mult'][0] != 1 or any(w % 32 for w in widths) \
                or not c['use_new_attention_order'] or c['num_head_channels'] < 1:
            raise ValueError(f'{model}: UNet2DModel has no patch_size, starts at model_channels, has groups of '
                             'channels in 32 and the new order of attention heads; this UNet is another')
        at = [c['image_size'] // 2 ** i in c['attention_resolutions'] for i in range(len(widths))]
        how = 'resnet' if c['resblock_updown'] else 'conv'
        down, up = [f'Resnet{way}sampleBlock2D' if how == 'resnet' else f'{way}Block2D' for way in ('Down', 'Up')]
        other = diffusers.UNet2DModel(
            c['image_size'], c['in_channels'], c['out_channels'], block_out_channels=widths, layers_per_block=n,
            down_block_types=['AttnDownBlock2D' if a else down for a in at],
            up_block_types=['AttnUpBlock2D' if a else up for a in at[::-1]], downsample_type=how, upsample_type=how,
            attention_head_dim=c['num_head_channels'], attn_norm_num_groups=32, norm_eps=1e-5, dropout=c['dropout'],
            resnet_time_scale_shift='scale_shift' if c['use_scale_shift_norm'] else 'default', freq_shift=0,
            flip_sin_to_cos=True, downsample_padding=1,
            num_class_embeds=c['num_classes'] + 1 if c['num_classes'] else None)

        def layer(source, target):
            if f'{source}.in_layers.0.weight' not in old:                      # a convolution
                return copy(f'{source}.op' if f'{source}.op.weight' in old else source, target)
            for a, b in (('in_layers.0', 'norm1'), ('in_layers.2', 'conv1'), ('emb_layers.1', 'time_emb_proj'),
                         ('out_layers.0', 'norm2'), ('out_layers.3', 'conv2'), ('skip_connection', 'conv_shortcut')):
                copy(f'{source}.{a}', f'{target}.{b}')

        def attention(source, target):
            copy(source + '.norm', target + '.group_norm')
            copy(source + '.qkv', target + '.', 'to_q', 'to_k', 'to_v')
            copy(source + '.proj_out', target + '.to_out.0')
        copy('time_embed.0', 'time_embedding.linear_1')
        copy('time_embed.2', 'time_embedding.linear_2')
        if c['num_classes']:                                                   # the null condition adds nothing
            new['class_embedding.weight'] = F.pad(old['label_emb.weight'], (0, 0, 0, 1))
        copy('input_blocks.0.0', 'conv_in')
        copy('out.0', 'conv_norm_out')
        copy('out.2', 'conv_out')
        layer('middle_block.0', 'mid_block.resnets.0')
        attention('middle_block.1', 'mid_block.attentions.0')
        layer('middle_block.2', 'mid_block.resnets.1')
        for i in range(len(widths)):
            last = i == len(widths) - 1
            for j in range(n + (not last)):
                source = f'input_blocks.{1 + i * (n + 1) + j}'
                part = f'resnets.{j}' if j < n else 'downsamplers.0' + '.conv' * (how == 'conv')
                layer(source + '.0', f'down_blocks.{i}.{part}')
                if j < n and at[i]:
                    attention(source + '.1', f'down_blocks.{i}.attentions.{j}')
            for j in range(n + 1):
                source, target, a = f'output_blocks.{i * (n + 1) + j}', f'up_blocks.{i}.', at[::-1][i]
                layer(source + '.0', f'{target}resnets.{j}')
                if a:
                    attention(source + '.1', f'{target}attentions.{j}')
                if j == n and not last:
                    source += '.2' if a else '.1'
                    layer(source + '.conv' * (how == 'conv'), f'{target}upsamplers.0' + '.conv' * (how == 'conv'))
    other.load_state_dict(new, strict=True)
    return other.eval()


# ---- check everything before any work starts ----
try:
    M.check_folder(out_dir)
    if os.path.isdir(out_dir) and os.listdir(out_dir):
        raise ValueError(f'out_dir={out_dir} holds other things, which are not mixed with a pipeline: a new folder')
    if not os.path.isfile(model):
        raise ValueError(f'no file {model}')
    net, diffusion = M.load_denoiser(model)
    network = net.net if isinstance(net, M.Pipeline) else to_diffusers(net)
    kind, spec = type(network).__name__, getattr(net, 'source', '')            # the teacher's pipeline, if it has one
    root, parts = M.read_pipeline(spec) if spec else ('', {})
    name = next((k for k in ('unet', 'transformer') if (parts.get(k) or [0, 0])[1] == kind), '')
    others, lost = {}, []                                                      # the teacher's parts; those not there
    if name:
        scheduler = M.load_part(spec, 'scheduler')
        if not os.path.isdir(spec):                                            # a hub's, not all of which may be here
            M.open_pipeline(spec, torch.float32, **{name: network})
        others = {k: os.path.abspath(os.path.join(root, k)) for k, v in parts.items()
                  if isinstance(v, list) and v[0] and k not in (name, 'scheduler')}
        lost = [k for k, path in others.items() if not os.path.isdir(path)]
        if set(lost) - set(M.UNUSED):
            raise ValueError(f"{spec} lacks its {', '.join(lost)}")
    predicts = {'eps': 'epsilon', 'v': 'v_prediction', 'x0': 'sample'}.get(diffusion.prediction)
    if not predicts or diffusion.config['schedule'] == 'flow' or name and not hasattr(scheduler, 'betas'):
        if predicts or not name or scheduler.config.get('shift') != diffusion.config['shift']:
            raise ValueError(f"{model}: diffusers samples {diffusion.prediction!r} on {diffusion.config['schedule']!r} "
                             "by no scheduler but a flow's in the pipeline of its teacher")
    else:
        alpha_bar = diffusion.alpha_bar[:-1]
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        own = diffusers.DDPMScheduler(                                         # by keywords: from_config forgets others
            num_train_timesteps=diffusion.T, trained_betas=betas.tolist(), clip_sample=diffusion.clip,
            variance_type='learned_range' if diffusion.learn_sigma else 'fixed_small')
        scheduler = scheduler if name else own
        theirs = scheduler.betas.double()
        same = len(theirs) == len(betas) and torch.allclose(theirs, betas, atol=1e-6)    # or the pipeline has changed
        scheduler = scheduler.from_config(scheduler.config if same else own.config, prediction_type=predicts)
except (ValueError, RuntimeError, TypeError) as e:
    M.die(e)

# ---- the folder, which appears as a whole ----
whole = name or kind == 'UNet2DModel' and not net.num_classes and not M.has_vae(net)
if not name:
    name = 'unet' if kind.startswith('UNet') else 'transformer'
    parts = {'_class_name': 'DDPMPipeline', '_diffusers_version': diffusers.__version__, name: ['diffusers', kind],
             'scheduler': ['diffusers', 'DDPMScheduler']}
target = os.path.realpath(out_dir)
try:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.tmp-', dir=os.path.dirname(target)) as tmp:
        folder = os.path.join(tmp, 'pipeline')
        network.save_pretrained(os.path.join(folder, name))
        scheduler.save_pretrained(os.path.join(folder, 'scheduler'))
        for part in others.keys() - lost:
            (os.symlink if link else shutil.copytree)(others[part], os.path.join(folder, part))
        if whole:
            with open(os.path.join(folder, 'model_index.json'), 'w') as f:
                more = {k: [None, None] for k in lost} | {'_guided': getattr(net, 'guided', False)}
                f.write(json.dumps(parts | more, indent=2) + '\n')
        os.rename(folder, target)
except Exception as e:                                                         # a full disk: safetensors' is no OSError
    M.die(f'{out_dir} is not written: {M.first_line(e)}')
print(f"{out_dir}: {parts['_class_name']}, for DiffusionPipeline.from_pretrained({out_dir!r})" if whole else
      f'{out_dir}: {kind} and its scheduler alone, no pipeline of diffusers samples from such a network')
