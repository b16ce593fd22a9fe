"""
What diffusers loads: pipelines (a folder or the name of one on the hub), networks by their
config.json, and VAEs. The scripts call this file for every folder and every name NAME/NAME:

    python dkdm.py --teacher=google/ddpm-cifar10-32
    # short for --teacher=adapters/hub.py:google/ddpm-cifar10-32

No code that lies in a folder or on the hub is ever run.
"""
import contextlib
import glob
import inspect
import json
import math
import os
import re

import torch
import torch.nn as nn
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError

import models as M

PIPELINE_NETWORKS = (
    'UNet2DModel', 'UNet2DConditionModel', 'DiTTransformer2DModel', 'SD3Transformer2DModel'
)
VAES = ('AutoencoderKL', 'AutoencoderTiny')
TEXT = ('text_encoder', 'text_encoder_2', 'text_encoder_3')
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
    `shared` holds the embedded texts. Raises UserError for a network that is not supported.
    """

    dtype_as_loaded = True  # its weights are of the dtype that load_denoiser is given

    def __init__(self, net):
        super().__init__()
        kind = type(net).__name__
        c = getattr(net, 'config', {})
        check_network(kind)
        known = dict(
            class_embed_type=(), addition_embed_type=('text', 'text_time'),
            encoder_hid_dim_type=('text_proj',), time_cond_proj_dim=()
        )
        for key, supported in known.items():
            if c.get(key) not in (None, *supported):
                raise M.UserError(
                    f'this {kind} takes a condition that is not supported: {key}={c[key]!r}'
                )
        out_channels = c.get('out_channels') or c.in_channels
        if out_channels not in (c.in_channels, 2 * c.in_channels):
            raise M.UserError(
                f'this {kind} predicts {out_channels} channels from {c.in_channels}: it takes an '
                'image as its condition (super-resolution, inpainting), which is not supported'
            )
        self.net = net
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
        size = c.sample_size
        if isinstance(size, (list, tuple)) and len(set(size)) == 1:
            size = size[0]
        M.check(
            isinstance(size, int),
            f'this {kind} has sample_size={size!r}: one number is wanted, '
            'teacher_config.image_size (or student_config.sample_size)'
        )
        self.image_size = size
        self.in_channels = c.in_channels
        self.config = {k: v for k, v in c.items() if not k.startswith('_')}
        self.config |= {'class': kind, 'image_size': size, 'out_channels': out_channels}
        self.config['adapter'] = 'hub'

    def set_process(self, diffusion):
        """On a flow, the network's own time for t is b_t T, as in SD3."""
        if diffusion.config['schedule'] == 'flow':
            self.times = (diffusion.b[:-1] * diffusion.T).float().to(self.net.device)

    @property
    def last_layer(self):
        channels = self.config['out_channels']
        if hasattr(self.net, 'conv_out'):  # U-Nets
            return self.net.conv_out, channels, True
        # DiTTransformer2DModel, SD3Transformer2DModel
        return getattr(self.net, 'proj_out_2', None) or self.net.proj_out, channels, False

    def predict_channels(self, channels):
        self.config['out_channels'] = channels
        self.net.register_to_config(out_channels=channels)
        self.net.out_channels = channels  # which the transformers' forward reads

    def set_prompts(self, prompts):
        """Embeds the texts with all text encoders of the pipeline, which are then freed."""
        pipe, _ = open_pipeline(
            self.source, self.net.dtype, unet=self.net, transformer=self.net,
            vae=getattr(self, 'vae', None)
        )
        for name in TEXT:
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).to(self.net.device)
        embedded = self.embed(pipe, [*prompts, ''])  # the last one, -1, is the null condition
        if self.config.get('addition_embed_type') == 'text_time':
            # SDXL: the original size, the corner of the crop and the target size
            side = self.image_size * pipe.vae_scale_factor
            embedded['time_ids'] = torch.tensor([[side, side, 0, 0, side, side]])
        self.shared |= {k: v.to(self.net.device, self.net.dtype) for k, v in embedded.items()}
        self.num_classes = len(prompts)

    @torch.no_grad()
    def embed(self, pipe, texts):
        """{'prompts': (N, L, D)} of N texts, and 'pooled' (N, D) if the pipeline has it; on the
        CPU."""
        parts = {}
        encode = pipe.encode_prompt
        kw = dict(
            device=self.net.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        for name in {'prompt_2', 'prompt_3'} & inspect.signature(encode).parameters.keys():
            kw[name] = None  # every encoder gets the same text
        for i in range(0, len(texts), 256):
            outputs = encode(prompt=texts[i : i + 256], **kw)[::2]  # skip the negative prompts
            for name, out in zip(('prompts', 'pooled'), outputs):
                parts.setdefault(name, []).append(out.cpu())
        embedded = {name: torch.cat(rows) for name, rows in parts.items()}
        if pipe.config.get('force_zeros_for_empty_prompt'):  # SDXL's null condition
            for rows in embedded.values():
                rows[-1] = 0
        return embedded

    def forward(self, x, t, y=None):
        y = torch.full_like(t, -1) if y is None else y
        kw = {}
        if self.condition == 'class':
            kw['class_labels'] = torch.where(y < 0, self.num_classes, y)
        elif self.condition == 'text':
            kw['encoder_hidden_states'] = self.shared['prompts'][y].to(self.net.dtype)
            pooled = None
            if 'pooled' in self.shared:
                pooled = self.shared['pooled'][y].to(self.net.dtype)
            if 'time_ids' in self.shared:
                ids = self.shared['time_ids'].expand(len(y), -1)
                kw['added_cond_kwargs'] = {'text_embeds': pooled, 'time_ids': ids}
            elif pooled is not None:
                kw['pooled_projections'] = pooled
        t = t if self.times is None else self.times[t]
        return self.net(x.to(self.net.dtype), timestep=t, **kw).sample.float()


def check_network(kind, of=''):
    """Raises UserError for a class of networks that is not supported. of: its pipeline's class."""
    M.check(
        kind in PIPELINE_NETWORKS,
        f"{of and of + ': '}a {kind} is not supported; {', '.join(PIPELINE_NETWORKS)} are. Others "
        'need an adapter, a Python file with load()'
    )


def check_name(spec):
    """Raises UserError for what cannot be the name of a model on the hub: such a string is a path,
    and there is nothing at it."""
    is_name = re.fullmatch(r'\w[\w.-]*/[\w.-]+', spec)
    M.check(
        is_name and not os.path.isdir(spec.split('/')[0]),  # else it is a path in that folder
        f'no file or folder {spec!r}'
    )


@contextlib.contextmanager
def one_line(spec):
    """What diffusers and the hub raise, for `spec`, as one line."""
    of_hub = {
        'GatedRepoError': 'accept its terms on its page there, and log in',
        'RepositoryNotFoundError': 'there is no such model',
        'LocalEntryNotFoundError': 'it cannot be reached, and its cache here has no such model',
        'EntryNotFoundError': 'the model is no pipeline, it has no model_index.json'
    }
    try:
        yield
    except M.UserError:
        raise
    except (OSError, ValueError, EntryNotFoundError, SafetensorError) as e:
        why = str(e).strip().split('\n')[0]
        if os.path.isdir(spec):
            raise M.UserError(f'{spec} cannot be loaded: {why}') from e
        known = [of_hub[c.__name__] for c in type(e).__mro__ if c.__name__ in of_hub]
        why = known[0] if known else why
        raise M.UserError(f'there is no folder {spec} here, and of the hub: {why}') from e


def read_pipeline(spec):
    """(folder, model_index.json as a dict) of a diffusers pipeline, local or on the hub. Raises
    M.UserError if it contains code."""
    path = os.path.join(spec, 'model_index.json')
    if not os.path.isdir(spec):
        import huggingface_hub

        check_name(spec)
        with one_line(spec), M.local_rank_0_first():
            path = huggingface_hub.hf_hub_download(spec, 'model_index.json')
    inside = glob.glob(f'{glob.escape(spec)}/*.safetensors')
    named = f'; name a file in it, {inside[0]}' if inside else ''
    M.check(os.path.isfile(path), f'{spec} is no pipeline: it has no model_index.json{named}')
    with open(path) as f:
        parts = json.load(f)
    # older versions of diffusers always run the code in a folder; newer ones only if asked to
    code = glob.glob(f'{glob.escape(spec)}/*/*.py') + glob.glob(f'{glob.escape(spec)}/None.py')
    for name, part in parts.items():
        known = part[0] in (None, 'diffusers', 'transformers') if isinstance(part, list) else True
        if not known and name not in UNUSED:
            code.append(part[0])
    if code:
        raise M.UserError(f'{spec} contains code ({code[0]}); pipelines with code are not loaded')
    return os.path.dirname(path), parts


def from_pretrained(kind, spec, **kw):
    """kind.from_pretrained; if there are only half-precision files, it loads those."""
    with one_line(spec), M.local_rank_0_first():
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
    pipe = from_pretrained(DiffusionPipeline, spec, dtype=dtype, **given)
    return pipe if pipe.dtype == dtype else pipe.to(dtype), parts


def load_part(spec, *names):
    """The first of the named parts that a pipeline has; a VAE or a scheduler."""
    import diffusers

    root, parts = read_pipeline(spec)
    name = next((n for n in names if parts.get(n, [None])[0]), None)
    kind = parts[name][1] if name else ''
    if not re.fullmatch('Autoencoder.*|VQModel|.*Scheduler', kind):
        raise M.UserError(
            f"{spec} has no {' or '.join(names)} of a diffusers class (found: {kind or 'none'})"
        )
    return from_pretrained(
        getattr(diffusers, kind), root if os.path.isdir(spec) else spec, subfolder=name
    )


def flow_shift(process, net):
    """The shift of a flow by its scheduler's config; where it depends on the size of the image
    (use_dynamic_shifting), the one for images of the network's size."""
    if not process.get('use_dynamic_shifting'):
        return process['shift']
    from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as sd3

    patches = (net.image_size // net.config.get('patch_size', 1)) ** 2
    limits = ('base_image_seq_len', 'max_image_seq_len', 'base_shift', 'max_shift')
    mu = sd3.calculate_shift(patches, *[process[k] for k in limits])
    return math.exp(mu) if process['time_shift_type'] == 'exponential' else mu


def load_denoiser(spec, dtype=torch.float32, image_size=0):
    """(net, diffusion) of a diffusers folder or hub id; the process is that of its scheduler. The
    text encoders are loaded by `set_prompts`. image_size: for a U-Net that does not say it. Raises
    UserError."""
    _, parts = read_pipeline(spec)
    for name in ('unet', 'transformer'):
        if (parts.get(name) or [None])[0]:
            check_network(parts[name][1], parts.get('_class_name', ''))
    if parts.get('requires_aesthetics_score'):
        raise M.UserError(f'{spec} refines images; the base model is supported')
    encoders = [name for name in parts if name.startswith(('text_encoder', 'tokenizer'))]
    pipe, parts = open_pipeline(spec, dtype, **dict.fromkeys(encoders))
    scheduler = pipe.scheduler
    process = scheduler.config
    network = getattr(pipe, 'unet', None) or getattr(pipe, 'transformer', None)
    if image_size:
        network.register_to_config(sample_size=image_size)
    net = Pipeline(network)
    if net.config.get('num_class_embeds') is not None:
        raise M.UserError(f'{spec}: class-conditional {type(network).__name__}s are not supported')
    net.source = os.path.abspath(spec) if os.path.isdir(spec) else spec
    net.guided = parts.get('_guided', False)  # export.py writes this
    M.attach_vae(net, getattr(pipe, 'vae', None) or getattr(pipe, 'vqvae', None))
    unsupported = (
        'shift_terminal', 'invert_sigmas', 'use_karras_sigmas', 'use_exponential_sigmas',
        'use_beta_sigmas'
    )
    if type(scheduler).__name__ == 'FlowMatchEulerDiscreteScheduler' and not any(
        process.get(k) for k in unsupported
    ):
        steps = process.num_train_timesteps
        shift = flow_shift(process, net)
        return net, M.Diffusion('flow', steps, 'flow', learn_sigma=False, clip=False, shift=shift)
    predictions = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x0'}
    prediction = predictions.get(process.get('prediction_type'))
    scaled = process.get('thresholding')  # for DeepFloyd IF, clamping x_0 replaces it
    kind = type(scheduler).__name__
    # their networks are themselves distilled, and predict no mean of x_0; 'learned' is a variance,
    # where Diffusion knows only a fraction between two ('learned_range')
    distilled = kind in ('LCMScheduler', 'TCDScheduler')
    variance = process.get('variance_type') or 'fixed_small'
    if (
        prediction is None
        or distilled
        or variance == 'learned'
        or not hasattr(scheduler, 'betas')
        or scaled
        and type(pipe).__name__ != 'IFPipeline'
    ):
        raise M.UserError(
            f'{spec}: its {kind} is not supported: it must have betas and a prediction_type, no '
            "thresholding, no variance_type='learned' and no network distilled to few steps (LCM, "
            'TCD); or be flow matching without other sigmas'
        )
    learn_sigma = net.config['out_channels'] == 2 * net.in_channels
    clip = bool(scaled)
    if process.get('clip_sample'):
        clip = process.get('clip_sample_range', 1.0)
    return net, M.Diffusion(
        scheduler.betas.tolist(), prediction=prediction, learn_sigma=learn_sigma, clip=clip,
        large_variance=variance.startswith('fixed_large')
    )


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL or AutoencoderTiny behind the interface of LVAE: images in [0, 1],
    one level, and no noise (std 0) where the class has no posterior. Latents are those of the
    network, or of its teacher after `in_units_of`."""

    has_prior = False  # noise has the scale of the latents, but makes no images of the teacher's
    decodes_theirs = True  # as a student it decodes the teacher's latents, as in a pipeline

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.in_channels = net.config.in_channels
        self.image_size = 0  # any
        self.config = {k: v for k, v in net.config.items() if not k.startswith('_')}
        self.config |= {'class': type(net).__name__, 'adapter': 'hub'}
        self.factor, self.offset = 1.0, 0.0

    def scaling(self):
        """(scale, shift): a pipeline's latents are (latents - shift) * scale."""
        return self.config['scaling_factor'], self.config.get('shift_factor') or 0.0

    def in_units_of(self, teacher):
        """Lets the latents of both be the same in a pipeline. Returns self."""
        (scale, shift), (scale_T, shift_T) = self.scaling(), teacher.scaling()
        self.factor = scale / scale_T
        self.offset = shift_T - shift * self.factor
        return self

    def noise(self, n, generator=None):
        """[noise (n, C, h, w)] with the mean and the scale of the latents."""
        c = self.config
        side = (c.get('sample_size') or 256) // 2 ** (len(c['block_out_channels']) - 1)
        shape = n, c['latent_channels'], side, side
        scale, shift = self.scaling()
        return [M.random_normal(shape, generator, self.net.device) / scale + shift]

    def encode(self, x):
        """[(mean, std)] of the latents (B, C, h, w)."""
        found = self.net.encode(x * 2 - 1)
        if hasattr(found, 'latent_dist'):
            mean, std = found.latent_dist.mean.float(), found.latent_dist.std.float()
        else:
            mean, std = found.latents.float(), torch.zeros_like(found.latents.float())
        return [(mean * self.factor + self.offset, std * self.factor)]

    def decode(self, noise, seen=None):
        """(out (B, C, H, W), q, p) of latents mean + std noise, or of the noise itself."""
        z = noise[0]
        p = []
        if seen:
            ((mean, std),) = seen
            z = mean + std * z
            p = [(torch.zeros_like(mean), torch.ones_like(std))]
        out = self.net.decode((z - self.offset) / self.factor).sample.float()
        return (out + 1) / 2, seen or [], p

    def forward(self, x, noise):
        return self.decode(noise, self.encode(x))

    def save_pretrained(self, folder):
        self.net.save_pretrained(folder)


def load_vae(spec):
    """An AutoencoderKL or AutoencoderTiny, as a folder or hub id, alone or in a pipeline. Raises
    UserError for anything else."""
    import diffusers

    if not os.path.isdir(spec):
        check_name(spec)
    try:
        kind = diffusers.AutoencoderKL.load_config(spec).get('_class_name')
    except OSError:  # no config.json: a pipeline
        kind = None
    net = load_part(spec, 'vae') if kind is None else None
    if kind in VAES:  # others may run code
        net = from_pretrained(getattr(diffusers, kind), spec)
    if type(net).__name__ not in VAES:
        raise M.UserError(f'{spec} is no AutoencoderKL or AutoencoderTiny of diffusers')
    return Autoencoder(net.float())


def build(class_name, config):
    """A network of diffusers with random weights: a denoiser (Pipeline) or a VAE (Autoencoder), by
    the name of its class and its config. Raises UserError for a class that is not supported."""
    import diffusers

    if class_name in PIPELINE_NETWORKS:
        config = {k: v for k, v in config.items() if k != 'image_size'}
        return Pipeline(getattr(diffusers, class_name)(**config))
    if class_name in VAES:
        return Autoencoder(getattr(diffusers, class_name).from_config(config))
    raise M.UserError(f'no network {class_name!r}')


def build_json(path, config):
    """The network of a config.json with changes, and random weights."""
    with open(M.existing(path)) as f:
        said = json.load(f)
    M.check('_class_name' in said, f'{path} is not the config.json of a network of diffusers')
    kind = said['_class_name']
    said = {k: v for k, v in said.items() if not k.startswith('_')}
    return build(kind, said | config)


def build_vae(path, config, teacher):
    """A VAE with random weights whose latents are those of its teacher in a pipeline. Raises
    UserError if one of both is not of diffusers."""
    net = build_json(path, config)
    M.check(
        isinstance(net, Autoencoder) and isinstance(teacher, Autoencoder),
        f"a VAE by its config.json, {path}, must be one of {', '.join(VAES)}, and its teacher too"
    )
    return net.in_units_of(teacher)


def build_student(path, config, num_classes, teacher):
    """The network of a config.json with changes, and random weights. It shares the embedded texts
    of its teacher. Raises UserError if it takes another condition."""
    net = build_json(path, config)
    M.check(isinstance(net, Pipeline), f'{path} is the config of a VAE')
    condition = getattr(teacher, 'condition', 'class' if num_classes else '')
    if net.condition != condition or condition == 'class' and net.num_classes != num_classes:
        raise M.UserError(
            f"{path} takes {net.num_classes or ''} {net.condition or 'no condition'}, the teacher "
            f"{num_classes or ''} {condition or 'none'} (num_class_embeds counts the null class)"
        )
    net.num_classes = num_classes
    net.shared = getattr(teacher, 'shared', net.shared)
    return net
