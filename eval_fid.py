"""
Measures how far the images of checkpoints, or any sets of images, are from a reference: FID, sFID, Inception Score,
precision, recall, KID, EMD, MMD and 1-NN accuracy, with each model's parameters, size, FLOPs and time per image; and
where a denoiser has the classifier's classes, how often the classifier agrees with the class asked for.

    python eval_fid.py --models=out/dkdm/student.safetensors,pretrained/mnist_classes.safetensors --guidance=2.0
    python eval_fid.py --models=samples.npz,folder/ --reference=VIRTUAL_imagenet256_labeled.npz --features=inception
    torchrun --nproc_per_node=8 eval_fid.py --models=student.safetensors --num_samples=50000 --features=inception \\
        --reference=cifar10

The statistics of a reference are made once with --save_stats; where there are no data, from the teacher's own samples:
    python eval_fid.py --reference=mnist --save_stats=pretrained/mnist_stats.npz
    python eval_fid.py --reference=pretrained/mnist_classes.safetensors --guidance=2.0 --seed=1 \\
        --save_stats=out/stats.npz

Only in the features of Inception is the Frechet distance called FID. Its statistics are accumulated as a stream; of the
features the first 10,000 of the reference and 50,000 of a model are kept for the other metrics. 50,000 images of 32x32
against 10,000, in the features of a ResNet-20: 93 to 100 s on two CPU cores (AMD EPYC, Zen 4) and 1.2 GB at the peak.
"""
import os
import time

# what is measured
models = ''                  # comma-separated: denoisers and VAEs (sampled), .npz files, folders, torchvision names
model_config = {}            # what an original checkpoint does not say (models.load_denoiser)
reference = 'pretrained/mnist_stats.npz'  # as above, or stored statistics, ours or ADM's
features = 'pretrained/mnist_resnet.safetensors'  # 'inception' (downloaded once), or a classifier
inception_weights = ''       # Inception's weights as a file, where there is no network
save_stats = ''              # write the reference's statistics to this .npz
n_two_sample = 1000          # EMD, MMD and 1-NN compare at most so many images of each set; 0 leaves them out
# sampling
num_samples = 5000           # images of each checkpoint; of sets of images: at most so many, 0 for all
sampler = 'ddim'             # 'ddpm', 'ddim' or 'dpm++'
steps = 8                    # the DKDM paper has 50 of ddpm, spaced evenly, for pixels, 200 of ddim for latents
spacing = 'trailing'         # of the steps: 'trailing', 'even' (Improved DDPM's) or 'leading' (DDIM's)
guidance = 1.0               # of checkpoints with classes or texts, but for those distilled with guidance
prompts = ''                 # checkpoints with texts: a file of them, one per line
batch_size = 100             # per rank; also of the feature network. The samples depend on it: a batch has one seed
# system
out_dir = 'out/eval'         # metrics.jsonl, and a grid of images per model
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # of the models: 'auto' (bfloat16 where the device has it), 'bfloat16', 'float32'
_ranges = {'sampler': ('ddpm', 'ddim', 'dpm++'), 'spacing': ('trailing', 'even', 'leading'),
           'num_samples': (0, 10 ** 9), 'n_two_sample': (0, 10 ** 5)}
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import hashlib
import json
import unittest.mock

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import models as M

NEIGHBOURS = 3               # k of precision and recall (Kynkaanniemi et al. 2019)
KEEP = 10_000, 50_000        # features kept of the reference and of a model, for all but FID: ADM's numbers
SPLIT = 5000                 # images per split of the Inception Score, ADM's


# ---- the metrics, of features (N, D) in float64, on the device ----
def inception_score(logits):
    """exp of the mean divergence of p(y|x) from p(y), averaged over splits (Salimans et al. 2016)."""
    scores = []
    for log_p in (split.log_softmax(1) for split in logits.split(SPLIT)):
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    return float(sum(scores) / len(scores))


def distances(a, b):
    """Blocks of rows of the Euclidean distances (len(a), len(b)), which never stand in memory as a whole.

    A block has 64 MB: what is below 32 MB comes from the heap, and there what a block leaves between others adds up
    to GB. torch.cdist would copy all of b for each of them.
    """
    size, (a2, b2) = max(1, 2 ** 23 // len(b)), (torch.linalg.vector_norm(x, dim=1) ** 2 for x in (a, b))
    for rows, rows2 in zip(a.split(size), a2.split(size)):
        yield torch.addmm(b2, rows, b.T, alpha=-2).add_(rows2[:, None]).clamp_(min=0).sqrt_()


def precision_recall(real, fake):
    """The share of fakes within the manifold of the reals, and of reals within that of the fakes: balls to the third
    neighbour (Kynkaanniemi et al. 2019)."""
    radii = [torch.cat([d.kthvalue(NEIGHBOURS + 1).values for d in distances(x, x)]) for x in (real, fake)]
    return [float(torch.cat([(d <= r).any(1) for d in distances(x, y)]).double().mean())
            for x, y, r in ((fake, real, radii[0]), (real, fake, radii[1]))]


def kid(real, fake):
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), over all pairs, not subsets."""
    def total(a, b):
        return sum(((rows @ b.T / a.shape[1] + 1) ** 3).sum() for rows in a.split(1000))
    def without_diagonal(a):
        n = len(a)
        return (total(a, a) - (((a * a).sum(1) / a.shape[1] + 1) ** 3).sum()) / (n * (n - 1))
    return float(without_diagonal(real) + without_diagonal(fake) - 2 * total(real, fake) / len(real) / len(fake))


def two_sample(real, fake):
    """EMD: mean distance of the best assignment. MMD: Gaussian kernel exp(-d^2 / (2 m)), m the mean squared distance
    within the reference; the root of the biased estimate. 1-NN: leave-one-out accuracy of telling the two apart, 0.5 is
    best (Xu et al. 2018). Both sets have the same size."""
    n, both = len(real), torch.cat([real, fake])
    d = torch.cat(list(distances(both, both)))
    across = d[:n, n:].cpu().numpy()
    k = (-d ** 2 / (2 * (d[:n, :n] ** 2).mean())).exp()
    mmd = k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()
    nearest_is_real = d.fill_diagonal_(float('inf')).argmin(1) < n
    return {'EMD': float(across[linear_sum_assignment(across)].mean()), 'MMD': float(mmd.clamp(min=0).sqrt()),
            '1-NN': float((nearest_is_real == (torch.arange(2 * n, device=d.device) < n)).double().mean())}


# ---- check everything before any work starts ----
specs = [s for s in models.split(',') if s]
inception = features == 'inception'
if not specs and not save_stats:
    M.die('nothing to measure: --models=student.safetensors, an .npz, a folder of images, or several with commas')
if save_stats and (not save_stats.endswith('.npz') or os.path.isdir(save_stats)):
    M.die(f'save_stats={save_stats}: a name that ends in .npz')
device, autocast, rank, world = M.start(device, dtype, seed)
exact = torch.device('cpu') if device.type == 'mps' else device                # where float64 is computed: mps has none


def is_images(spec):
    if os.path.isdir(spec):
        return not os.path.exists(os.path.join(spec, 'model_index.json'))      # else a diffusers pipeline
    return spec.endswith('.npz') or not (spec.endswith(M.WEIGHTS) or '/' in spec)


def load_inception():
    """torch-fidelity's Inception with TensorFlow's resize, and its name as a feature space."""
    import torch_fidelity.feature_extractor_inceptionv3 as fidelity
    url = fidelity.URL_INCEPTION_V3
    file = os.path.join(torch.hub.get_dir(), 'checkpoints', os.path.basename(url))
    try:
        with M.one_first():
            if not inception_weights and not os.path.exists(file):
                os.makedirs(os.path.dirname(file), exist_ok=True)
                torch.hub.download_url_to_file(url, file, '6726825d', progress=False)
        state, _ = M.read_weights(inception_weights or file)
        # its own torch.load runs code
        with unittest.mock.patch.object(fidelity, 'load_state_dict_from_url', lambda *args, **kw: state):
            net = fidelity.FeatureExtractorInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'])
    except Exception as e:
        raise ValueError(f'the weights of Inception are not to be had ({M.first_line(e)}): put '
                         f'{os.path.basename(file)} from {os.path.dirname(url)} to {file}, or name the file with '
                         '--inception_weights') from None
    with open(inception_weights or file, 'rb') as f:                           # the genuine file's name has its hash
        name = hashlib.sha256(f.read()).hexdigest()[:8]
    return net, 'inception' if name in file else f'inception {name}'


def open_source(spec):
    """The uint8 images that a spec names, or (net, diffusion) of what is sampled, diffusion None for a VAE."""
    if is_images(spec):
        images, _ = M.load_images(spec)
        made, source = images.shape[1], images
    else:
        if M.class_in(spec) == 'LVAE':
            net, diffusion = M.load_vae(spec), None
        else:
            net, diffusion = M.load_denoiser(spec, M.pick_dtype(device, dtype),
                                             **{} if len(specs) > 1 and M.class_in(spec) else model_config)
            M.sampling_steps(diffusion.T, steps, spacing)
        if not num_samples:
            raise ValueError('num_samples=0 takes all images of a set; a checkpoint needs a number')
        net = M.cast_frozen(net.to(device, memory_format=M.memory_format(device)), M.pick_dtype(device, dtype))
        if getattr(net, 'condition', '') == 'text':
            net.set_prompts(M.read_lines(prompts, f'{spec} takes texts: --prompts=file.txt'),
                            os.path.join(out_dir, 'prompts.safetensors'))
        if guidance != 1 and diffusion and not net.num_classes:
            raise ValueError(f'guidance={guidance}: {spec} has no classes to be guided to')
        made, source = 3 if M.has_vae(net) else net.config['in_channels'], (net, diffusion)
    if made != channels and not (inception and made == 1):
        raise ValueError(f'{spec} has {made} channels, features={features} takes {channels}: a classifier of such '
                         "images, or 'inception'")
    return source


try:
    if inception:
        net_F, space = load_inception()
        net_F, channels, D, classes = net_F.to(device), 3, 2048, 1008
        spatial = []                                                           # of sFID: 7 channels of 17 x 17
        net_F.Mixed_6d.branch1x1.register_forward_hook(lambda m, args, out: spatial.append(out[:, :7].flatten(1)))
    else:
        net_F, space, D = M.load_features(features, device)
        channels, classes = net_F.config.get('in_channels', 3), net_F.config['num_classes']
    sizes, stored = {'mu': D, 'mu_s': 2023}, None
    inputs = [open_source(spec) for spec in specs]
    if reference.endswith('.npz') and not save_stats:
        stored = M.read_statistics(reference, space, sizes)
    for folder in [out_dir] * bool(specs) + [os.path.dirname(os.path.abspath(save_stats))] * bool(save_stats):
        M.check_folder(folder)
    ref_source = open_source(reference) if stored is None else None
except (ValueError, RuntimeError, TypeError) as e:
    M.die(e)


# ---- features ----
def summed(x):
    """The sum of a tensor over all ranks."""
    if world > 1:
        dist.all_reduce(x)
    return x


class Moments:
    """Mean and covariance of a stream of features over all ranks, accumulated in float64."""

    def __init__(self, size):
        self.packed = torch.zeros(size + size ** 2 + 1, dtype=torch.float64, device=exact)
        self.s, self.ss, self.n = self.packed[:size], self.packed[size:-1].view(size, size), self.packed[-1]

    def add(self, f):
        self.s += f.sum(0)
        self.ss.addmm_(f.T, f)
        self.n += len(f)

    def result(self):
        summed(self.packed)
        mu = self.s / self.n
        return mu, (self.ss - self.n * torch.outer(mu, mu)) / (self.n - 1).clamp(min=1)


@torch.inference_mode()
def extract(batches, total, keep):
    """What is known of a set of images, uint8 (B, C, H, W) per batch with their places in the set: count, mu and sigma
    (of the spatial features too), and the first `keep` features and logits, in order; all on the device."""
    moments, moments_s = Moments(D), Moments(2023) if inception else None
    kept = torch.zeros(min(keep, total), D + classes, device=exact)
    for places, x in tqdm(batches, total=-(-total // batch_size // world), disable=rank > 0, leave=False):
        if inception:
            f, logits = net_F(x.to(device).expand(-1, 3, -1, -1))
            moments_s.add(spatial.pop().to(exact).double())
        else:
            f, logits = M.features(net_F, x.to(device))
        moments.add(f.to(exact).double())
        mine = kept[places.start:places.stop]
        mine.copy_(torch.cat([f, logits], dim=1)[:len(mine)])
    out = dict(zip(('mu', 'sigma'), moments.result()), n=total)
    if inception:
        out |= dict(zip(('mu_s', 'sigma_s'), moments_s.result()))
    kept = summed(kept)                                                        # every rank has filled its own rows
    return out | dict(features=kept[:, :D].double(), logits=kept[:, D:].double())


def image_batches(images):
    """This rank's share of a set of images."""
    for i in range(rank * batch_size, len(images), world * batch_size):
        yield range(i, min(i + batch_size, len(images))), images[i:i + batch_size]


def generator(i):
    """Of all that is random in the batch that begins with sample i."""
    return torch.Generator(device).manual_seed(seed * 1_000_000_007 + i)


def scale_of(net):
    return 1. if getattr(net, 'guided', False) else guidance


def draw_labels(net, i, g):
    """What is asked of the batch that begins with sample i: the first that its generator draws."""
    return torch.randint(net.num_classes, (min(batch_size, num_samples - i),), generator=g, device=device)


def sample_batches(net, diffusion, seconds):
    """This rank's share of the samples, of a denoiser or a VAE. Every batch has a seed of its own, so the set is the
    same for any number of ranks; it is another one for another batch_size, and on another kind of device."""
    C, H = (net.config[k] for k in ('in_channels', 'image_size'))
    for i in range(rank * batch_size, num_samples, world * batch_size):
        places, g = range(i, min(i + batch_size, num_samples)), generator(i)
        t0 = time.time()
        with autocast, torch.no_grad():
            if diffusion:
                y = draw_labels(net, i, g) if net.num_classes else None
                x = M.decode(net, M.sample(net, diffusion, (len(places), C, H, H), steps, sampler, y, scale_of(net), g,
                                           spacing=spacing))
            else:
                x = net.generate(net.noise(len(places), g))[0][:, :C] * 2 - 1
            x = M.to_uint8(x).cpu()                                            # the clock waits for the device
        seconds.append((time.time() - t0) / len(places))
        yield places, x


def opened(source, seconds=None):
    """(batches, number of images) of what `open_source` found."""
    if torch.is_tensor(source):
        return image_batches(source), len(source)
    return sample_batches(*source, [] if seconds is None else seconds), num_samples


def first(batches, kept):
    """Passes batches on and keeps the first for the picture."""
    for places, x in batches:
        if not kept:
            kept.append(x[:100])
        yield places, x


# ---- the reference ----
ref = stored or extract(*opened(ref_source), KEEP[0])
moments = {k: torch.as_tensor(v, dtype=torch.float64, device=exact) for k, v in ref.items()
           if k in ('mu', 'sigma', 'mu_s', 'sigma_s')}
if save_stats and rank == 0:
    arrays = {k: v.cpu().numpy() for k, v in moments.items()} | {'n': ref['n'], 'space': space}
    M.write_atomically(save_stats, lambda tmp: np.savez(tmp, **arrays))
    print(f"{save_stats}: statistics of {ref['n']:,} images of {reference} in the space of {space}")

# ---- the models ----
def written(v):
    """A cell of the table."""
    return '' if v is None else v if isinstance(v, str) else f'{v:,}' if isinstance(v, int) else f'{v:.4g}'


table = []
for spec, source in zip(specs, inputs):
    kept, seconds, row = [], [], {'model': spec}
    batches, total = opened(source[:num_samples or None] if torch.is_tensor(source) else source, seconds)
    found = extract(first(batches, kept), total, KEEP[1])
    if rank:
        continue
    if seconds:
        net, diffusion = source
        x = torch.zeros(1, *[net.config[k] for k in ('in_channels', 'image_size', 'image_size')], device=device)
        seconds = seconds[1:] or seconds                                       # the first batch warms up
        with FlopCounterMode(display=False) as flops, autocast, torch.no_grad():
            net(x, torch.zeros(1, dtype=torch.long, device=device)) if diffusion else net.generate(net.noise(1))
        row |= {'parameters': sum(p.numel() for p in net.parameters()),
                'MB': os.path.getsize(spec) / 2 ** 20 if os.path.isfile(spec) else None,
                'MFLOPs': flops.get_total_flops() / 1e6, 'ms/image': 1000 * np.mean(seconds),
                '+-': 1000 * np.std(seconds)}
    row['images'] = total
    row['FID' if inception else 'Frechet'], singular = M.frechet_distance(
        found['mu'], found['sigma'], moments['mu'], moments['sigma'])
    if inception and 'mu_s' in ref:
        row['sFID'], _ = M.frechet_distance(found['mu_s'], found['sigma_s'], moments['mu_s'], moments['sigma_s'])
    row['IS' if inception else 'score'] = inception_score(found['logits'])
    if seconds and diffusion and net.num_classes == classes:                  # does the classifier agree?
        seen = found['logits'].argmax(1)
        asked = [draw_labels(net, i, generator(i)) for i in range(0, len(seen), batch_size)]
        row['agreement'] = float((seen == torch.cat(asked)[:len(seen)].to(exact)).double().mean())
    if 'features' in ref:
        real, fake = ref['features'], found['features']
        row['precision'], row['recall'] = precision_recall(real, fake)
        row['KID'] = kid(real, fake[:KEEP[0]])
        n = min(n_two_sample, len(real), len(fake))
        row |= two_sample(real[:n], fake[:n]) if n > 1 else {}
    if total <= D or singular:
        print(f'{spec}: {total:,} images for {D:,} features'
              + (', so the covariance has not full rank and the distance is biased' if total <= D else
                 ': the product of the covariances is near singular, its root uncertain'))
    table.append(row)
    how = dict(features=space, reference=reference, reference_images=int(ref['n']) if 'n' in ref else None, seed=seed,
               n_two_sample=n_two_sample, device=device.type, batch_size=batch_size)
    if seconds and diffusion:
        how |= dict(sampler=sampler, steps=steps, spacing=spacing, guidance=scale_of(net))
    os.makedirs(out_dir, exist_ok=True)
    if seconds and getattr(net, 'condition', '') == 'text':
        net.keep_prompts(os.path.join(out_dir, 'prompts.safetensors'))
    with open(os.path.join(out_dir, 'metrics.jsonl'), 'a') as f:
        f.write(json.dumps(row | how) + '\n')
    name = os.path.splitext(spec.rstrip('/'))[0].replace(os.sep, '_').strip('._')[-100:]
    M.save_grid(os.path.join(out_dir, f'{name}.png'), [M.to_float(kept[0])], 10)
if table:
    columns = list(dict.fromkeys(k for row in table for k in row))
    cells = [columns] + [[written(row.get(k)) for k in columns] for row in table]
    widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
    print(f"features of {space}; reference {reference}" + (f" ({int(ref['n']):,} images)" if 'n' in ref else '')
          + f'; denoisers: {sampler}, {steps} steps, {spacing}; seed {seed}')
    for r in cells:
        print('  '.join([r[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(r[1:], widths[1:])]))
M.leave()
