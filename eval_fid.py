"""
Measures how far the images of checkpoints, or any sets of images, are from a reference: FID, sFID,
Inception Score, precision, recall, KID, EMD, MMD and 1-NN accuracy, with each model's parameters,
size, FLOPs of a pass and time per image. If a denoiser has the classifier's classes, it also
measures how often the classifier predicts the requested class.

    python eval_fid.py --models=out/dkdm/student.safetensors
    python eval_fid.py --models=pretrained/mnist_classes.safetensors --guidance=2.0
    python eval_fid.py --models=samples.npz,folder/ --features=inception \\
        --reference=VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 eval_fid.py --models=student.safetensors --num_samples=50000 \\
        --features=inception --reference=cifar10

--save_stats computes the statistics of a reference once; without data, use the teacher's own
samples:
    python eval_fid.py --reference=mnist --save_stats=out/mnist_stats.npz
    python eval_fid.py --reference=pretrained/mnist_classes.safetensors --guidance=2.0 --seed=1 \\
        --save_stats=out/stats.npz

The Frechet distance is called FID only in the features of Inception. Its statistics are
accumulated as a stream; for the other metrics, the features of the first 10,000 images of the
reference and 50,000 of a model are kept. 50,000 images of 32x32 against 10,000, in the features of
a ResNet-20, take 93 to 100 s on two CPU cores (AMD EPYC, Zen 4), and 1.2 GB of memory at the peak.
"""
import os

# what is measured
models = ''                  # comma-separated: denoisers and VAEs (sampled), .npz files, folders,
                             # torchvision names; with a network of your own
                             # my_student.py:student.safetensors
model_config = {}            # what an original checkpoint does not record (adapters/original.py)
reference = ''               # as above, or stored statistics, ours or ADM's; '' is the bundled ones
                             # of MNIST for grey images, of CIFAR-10 for others
features = ''                # 'inception' (downloaded once), or a classifier; '' is the one of the
                             # stored statistics
inception_weights = ''       # a file with Inception's weights, for machines that are offline
save_stats = ''              # write the reference's statistics to this .npz
reconstruct = ''             # a set of images: VAEs with an encoder are also given these, and `MSE`
                             # is the squared error of what they make of them, per pixel in [0, 1]
n_two_sample = 1000          # EMD, MMD and 1-NN compare at most this many images of each set;
                             # 0 skips these metrics
# sampling
num_samples = 5000           # images of each checkpoint; of a set of images at most this many, 0
                             # for all
sampler = ''                 # 'ddpm', 'ddim' or 'dpm++'; '' is what the student's file says, or
                             # else 'ddim'
steps = 0                    # evaluations; 0 is what the student's file says, or else 8. The DKDM
                             # paper takes 50 of ddpm, spaced 'even', for pixels and 200 of ddim
                             # for latents
spacing = ''                 # of the steps; '' is what the file says, or else 'trailing'.
                             # 'trailing', 'even' (Improved DDPM's) or 'leading' (DDIM's)
guidance = 1.0               # scale for conditional checkpoints; students distilled with guidance
                             # are sampled without it
prompts = ''                 # text-conditional checkpoints: a file of texts, one per line; '' is
                             # the one that the student's file names
batch_size = 100             # per rank, for sampling and for the feature network. The samples
                             # depend on it, because each batch has one seed
# system
out_dir = 'out/eval'         # metrics.jsonl, and a grid of images per model
seed = 0
device = 'auto'              # 'auto', 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = 'auto'               # of the models: 'auto' (bfloat16 where the device has it), 'bfloat16',
                             # 'float32'
_ranges = {                  # allowed values of string settings
    'sampler': ('', 'ddpm', 'ddim', 'dpm++'), 'spacing': ('', 'trailing', 'even', 'leading'),
    'dtype': ('auto', 'bfloat16', 'float32')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import hashlib
import json
import time
import unittest.mock

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import models as M

image_sets = M.adapter('images')

NEIGHBOURS = 3  # k of precision and recall (Kynkaanniemi et al. 2019)
# features kept of the reference and of a model, for the metrics other than FID; as in ADM
KEEP = 10_000, 50_000
SPLIT = 5000  # images per split of the Inception Score, ADM's


# ==== the metrics, of features (N, D) in float64, on the device ====
def inception_score(logits):
    """exp of the mean KL of p(y|x) from p(y), averaged over splits (Salimans et al. 2016)."""
    scores = []
    for split in logits.split(SPLIT):
        log_p = split.log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    return float(sum(scores) / len(scores))


def distances(a, b):
    """Yields the matrix of Euclidean distances (len(a), len(b)) in blocks of rows, to save memory.

    A block has 64 MB. Blocks below 32 MB would come from the heap and fragment it, by gigabytes;
    torch.cdist would copy all of b for each block.
    """
    rows_at_once = max(1, 2**23 // len(b))
    a2 = torch.linalg.vector_norm(a, dim=1) ** 2
    b2 = torch.linalg.vector_norm(b, dim=1) ** 2
    for rows, rows2 in zip(a.split(rows_at_once), a2.split(rows_at_once)):
        yield torch.addmm(b2, rows, b.T, alpha=-2).add_(rows2[:, None]).clamp_(min=0).sqrt_()


def third_neighbour(x):
    """The distance (N,) of every row to its third nearest neighbour, where the first of the
    sorted distances is that to itself."""
    return torch.cat([d.kthvalue(NEIGHBOURS + 1).values for d in distances(x, x)])


def covered(x, y, radii):
    """The fraction of rows of x within `radii` of any row of y."""
    return float(torch.cat([(d <= radii).any(1) for d in distances(x, y)]).double().mean())


def precision_recall(real, fake):
    """The fraction of fakes within the manifold of the reals, and vice versa; a manifold is the
    union of balls that reach to the third neighbour (Kynkaanniemi et al. 2019)."""
    return covered(fake, real, third_neighbour(real)), covered(real, fake, third_neighbour(fake))


def kid(real, fake):
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), over all pairs,
    not subsets."""
    D = real.shape[1]

    def total(a, b):
        return sum(((rows @ b.T / D + 1) ** 3).sum() for rows in a.split(1000))

    def without_diagonal(a):
        n = len(a)
        diagonal = (((a * a).sum(1) / D + 1) ** 3).sum()
        return (total(a, a) - diagonal) / (n * (n - 1))

    across = total(real, fake) / len(real) / len(fake)
    return float(without_diagonal(real) + without_diagonal(fake) - 2 * across)


def two_sample(real, fake):
    """EMD: mean distance of the best assignment. MMD: Gaussian kernel exp(-d^2 / (2 m)), m the mean
    squared distance within the reference; the root of the biased estimate. 1-NN: leave-one-out
    accuracy of a nearest-neighbour classifier of real and fake, 0.5 is best (Xu et al. 2018). Both
    sets have the same size.
    """
    n = len(real)
    both = torch.cat([real, fake])
    d = torch.cat(list(distances(both, both)))
    across = d[:n, n:].cpu().numpy()
    emd = across[linear_sum_assignment(across)].mean()
    k = (-(d**2) / (2 * (d[:n, :n] ** 2).mean())).exp()
    mmd = k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()
    nearest_is_real = d.fill_diagonal_(float('inf')).argmin(1) < n
    is_real = torch.arange(2 * n, device=d.device) < n
    return {
        'EMD': float(emd),
        'MMD': float(mmd.clamp(min=0).sqrt()),
        '1-NN': float((nearest_is_real == is_real).double().mean()),
    }


class Moments:
    """Mean and covariance of a stream of features (B, D) over all ranks, accumulated in float64."""

    def __init__(self, size, device):
        self.packed = torch.zeros(size + size**2 + 1, dtype=torch.float64, device=device)
        self.s = self.packed[:size]
        self.ss = self.packed[size:-1].view(size, size)
        self.n = self.packed[-1]

    def add(self, f):
        self.s += f.sum(0)
        self.ss.addmm_(f.T, f)
        self.n += len(f)

    def result(self):
        """(mean (D,), covariance (D, D))."""
        all_reduce_sum(self.packed)
        mu = self.s / self.n
        return mu, (self.ss - self.n * torch.outer(mu, mu)) / (self.n - 1).clamp(min=1)


def all_reduce_sum(x):
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ==== feature spaces: fn(uint8 images) -> features (B, D), logits, spatial features (B, 2023)
# ==== (None for classifiers)
def load_inception(path=''):
    """(net, space) of torch-fidelity's Inception with TensorFlow's resize: its weights from a file,
    or downloaded once."""
    import torch_fidelity.feature_extractor_inceptionv3 as fidelity

    url = fidelity.URL_INCEPTION_V3
    genuine = os.path.basename(url)
    if not path:
        path = os.path.join(torch.hub.get_dir(), 'checkpoints', genuine)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with M.local_rank_0_first():  # all ranks come here: it waits for them
            try:
                if not os.path.exists(path):
                    torch.hub.download_url_to_file(url, path, '6726825d', progress=False)
            except OSError as e:
                raise M.UserError(
                    f'the weights of Inception cannot be downloaded ({e}): put {genuine} from '
                    f'{os.path.dirname(url)} to {path}, or name the file with --inception_weights'
                ) from e
    state, _ = M.read_weights(path)
    # its own torch.load would run code
    with unittest.mock.patch.object(
        fidelity, 'load_state_dict_from_url', lambda *args, **kw: state
    ):
        net = fidelity.FeatureExtractorInceptionV3(
            'inception-v3-compat', ['2048', 'logits_unbiased']
        )
    with open(path, 'rb') as f:  # the official file's name ends in its hash
        name = hashlib.sha256(f.read()).hexdigest()[:8]
    return net, 'inception' if name in genuine else f'inception {name}'


def inception_features(net):
    """fn(uint8 images); the spatial features are sFID's, 7 channels of 17 x 17."""
    spatial = []
    net.Mixed_6d.branch1x1.register_forward_hook(
        lambda m, args, out: spatial.append(out[:, :7].flatten(1))
    )

    def extract(x):
        f, logits = net(x.expand(-1, 3, -1, -1))
        return f, logits, spatial.pop()

    return extract


@torch.inference_mode()
def measure_set(batches, total, keep, extract, sizes, device, progress=True):
    """Statistics of a set of images: count, mu and sigma (also of the spatial features), and the
    first `keep` features and logits, in order.

    batches: (indices in the set, uint8 (B, C, H, W)) of this rank. extract: see above. sizes: the
    numbers of features, logits and spatial features (0 for none). device: computes in float64.
    """
    D, classes, D_s = sizes
    moments = Moments(D, device)
    moments_s = Moments(D_s, device)
    kept = torch.zeros(min(keep, total), D + classes, device=device)
    for places, x in tqdm(batches, disable=not progress, leave=False):
        f, logits, spatial = extract(x)
        moments.add(f.to(device).double())
        if D_s:
            moments_s.add(spatial.to(device).double())
        mine = kept[places.start : places.stop]
        mine.copy_(torch.cat([f, logits], dim=1)[: len(mine)])
    found = {'n': total}
    found['mu'], found['sigma'] = moments.result()
    if D_s:
        found['mu_s'], found['sigma_s'] = moments_s.result()
    kept = all_reduce_sum(kept)  # every rank has filled its own rows
    return found | dict(features=kept[:, :D].double(), logits=kept[:, D:].double())


# ==== sets of images, and samples ====
def is_images(spec):
    """Whether a spec names images; otherwise it is a network."""
    if os.path.isdir(spec):
        # a folder with one of these files is a pipeline or a network of diffusers
        marks = ('model_index.json', 'config.json')
        return not any(os.path.exists(os.path.join(spec, mark)) for mark in marks)
    path, _ = image_sets.split_classes(spec)
    endings = ('.npz', '.npy', '.txt')
    if path.endswith(endings) or os.path.isdir(path):
        return True
    return image_sets.torchvision_dataset(path) is not None


def student_of(spec):
    """The student in the folder of a run, whose pictures are no set of images; else `spec` itself.
    Raises UserError for a run that has none yet."""
    for name in ('student.safetensors', 'student'):
        path = os.path.join(spec, name)
        if os.path.exists(path) and os.path.exists(os.path.join(spec, 'log.csv')):
            if M.rank_and_world()[0] == 0:
                print(f'{spec} is the folder of a run: {path} is measured')
            return path
    M.check(
        not os.path.exists(os.path.join(spec, 'ckpt.pt')), f'{spec} is a run without a student yet'
    )
    return spec


def load_network(spec, dtype, **known):
    """(net, diffusion) of a denoiser, (net, None) of a VAE or another generator."""
    file, weights = M.split_file(spec)
    is_denoiser = True
    if file and os.path.isfile(weights):
        is_denoiser = 'diffusion' in M.read_weights(weights)[1]
    elif file:
        is_denoiser = isinstance(M.load_from_file('denoiser', spec, {})[0], tuple)
    elif os.path.isfile(spec):
        is_denoiser = M.kind_of(M.read_model(spec)[1]) != 'LVAE'
    if not is_denoiser:
        return M.load_vae(spec), None
    return M.load_denoiser(spec, dtype, **known if M.is_plain(spec) else {})


class ImageSet:
    """uint8 images (N, C, H, W). They are measured in random order if only some of them are, or if
    they are sorted by class: the first ones would be those of the first classes."""

    def __init__(self, images, labels, batch_size):
        self.images = images
        self.n = len(images)
        self.batch_size = batch_size
        self.sorted = labels is not None and bool((labels.diff() >= 0).all())

    def one(self):
        return self.images[:1]

    def take(self, n):
        """Only n images are measured; 0 for all."""
        self.sorted = self.sorted or 0 < n < self.n
        self.n = min(n or self.n, self.n)
        return self

    def batches(self, rank, world):
        """This rank's share: (places, images)."""
        order = torch.arange(len(self.images))
        if self.sorted:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        for i in range(rank * self.batch_size, self.n, world * self.batch_size):
            picked = order[i : min(i + self.batch_size, self.n)]
            yield range(i, i + len(picked)), self.images[picked]


class Samples:
    """Samples of a denoiser, or of a VAE (diffusion None). Every batch has its own seed, so
    the set does not depend on the number of ranks; it depends on batch_size and on the kind of
    device."""

    def __init__(self, net, diffusion, n, batch_size, seed, device, autocast, guidance=1.0, **how):
        self.net, self.diffusion = net, diffusion
        if diffusion is not None:
            M.graph_network(net, device)
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.device, self.autocast = device, autocast
        said = getattr(net, 'sampling', {})  # what the student's file says
        usual = dict(sampler='ddim', steps=8, spacing='trailing') | said
        self.how = {k: how.get(k) or v for k, v in usual.items()}
        self.how['guidance'] = 1.0 if getattr(net, 'guided', False) else guidance
        self.seconds = []  # per image, of each batch

    def generator(self, i):
        """The random generator of the batch that begins with sample i."""
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_000_007 + i)

    def labels(self, i, g):
        """The labels of the batch that begins with sample i, the first draw from its generator g;
        None for networks without classes."""
        classes = getattr(self.net, 'num_classes', 0)
        size = min(self.batch_size, self.n - i)
        return torch.randint(classes, (size,), generator=g, device=self.device) if classes else None

    @torch.no_grad()
    def make(self, size, y, g):
        net = self.net
        with self.autocast:
            if self.diffusion is None:
                made = net.decode(net.noise(size, g))
                made = made if torch.is_tensor(made) else made[0]
                C = getattr(net, 'in_channels', made.shape[1])
                low, high = getattr(net, 'image_range', (0, 1))
                return (made[:, :C].float() - low) / (high - low) * 2 - 1
            shape = size, net.in_channels, net.image_size, net.image_size
            x = M.sample(net, self.diffusion, shape, y=y, generator=g, **self.how)
            return M.decode(net, x)

    def one(self):
        """One image (1, C, H, W), to see what the network makes."""
        g = self.generator(0)
        classes = self.diffusion is not None and self.net.num_classes
        return self.make(1, self.labels(0, g)[:1] if classes else None, g)

    def batches(self, rank, world):
        """This rank's share: (places, uint8 images on the CPU)."""
        for i in range(rank * self.batch_size, self.n, world * self.batch_size):
            g = self.generator(i)
            places = range(i, min(i + self.batch_size, self.n))
            begin = time.time()
            # .cpu() waits for the device, so the time is complete
            x = M.to_uint8(self.make(len(places), self.labels(i, g), g)).cpu()
            self.seconds.append((time.time() - begin) / len(places))
            yield places, x

    def cost(self):
        """Parameters, FLOPs of one evaluation, passes and time per image."""
        net = self.net
        device = next(net.parameters()).device
        with FlopCounterMode(display=False) as flops, self.autocast, torch.no_grad():
            if self.diffusion is None:
                net.decode(net.noise(1))
            else:
                x = torch.zeros(1, net.in_channels, net.image_size, net.image_size, device=device)
                t = torch.zeros(1, dtype=torch.long, device=device)
                net(x, t, t if net.num_classes else None)
        seconds = self.seconds[1:] or self.seconds  # the first batch warms up
        row = {
            'parameters': sum(p.numel() for p in net.parameters()),
            'MFLOPs': flops.get_total_flops() / 1e6,
        }
        if self.diffusion is not None:
            row['passes'] = self.how['steps'] * (
                2 if self.how['guidance'] != 1 and net.num_classes else 1
            )
        return row | {'ms/image': 1000 * np.mean(seconds), '+-': 1000 * np.std(seconds)}


@torch.no_grad()
def reconstruction_error(vae, images, autocast, device):
    """The mean squared error, per pixel in [0, 1], of what a VAE makes of an ImageSet: decoded from
    the mean of the posterior, with no noise at any level. The ranks share the images."""
    low, high = getattr(vae, 'image_range', (0, 1))
    total = torch.zeros((), device=device)
    for _, x in images.batches(*M.rank_and_world()):
        x = x.to(device).float() / 255
        with autocast:
            seen = vae.encode(x)
            out = vae.decode([torch.zeros_like(mean) for mean, _ in seen], seen)[0]
        out = (out[:, : x.shape[1]].float() - low) / (high - low)
        total += ((out - x) ** 2).mean((1, 2, 3)).sum()
    return all_reduce_sum(total).item() / images.n


def feature_space(features, reference, channels):
    """(features, reference), where '' stands for what the stored statistics say, or else for the
    bundled ones for images of so many channels."""
    if not features and reference.endswith('.npz'):
        with M.open_npz(reference) as z:
            if 'mu' in z or 'pool_3' in z:  # ADM's files do not name their space, Inception's
                features = str(z.get('features', '' if 'space' in z else 'inception'))
    usual_features, usual_reference = M.SPACES[1 if channels == 1 else 3]
    return features or usual_features, reference or usual_reference


def has_images(path):
    with M.open_npz(path) as z:
        return 'arr_0' in z


def written(v):
    """A value formatted as a cell of the table."""
    if v is None:
        return ''
    if isinstance(v, int):
        return f'{v:,}'
    return v if isinstance(v, str) else f'{v:.4g}'


# ==== set-up ====
if __name__ == '__main__':
    specs = [models] if os.path.exists(models) else [s for s in models.split(',') if s]
    specs = [student_of(spec) for spec in specs]
    if not specs and not save_stats:
        raise M.UserError(
            'nothing to measure: --models=student.safetensors, an .npz, a folder, or several with '
            'commas'
        )
    if save_stats and not save_stats.endswith('.npz'):
        raise M.UserError(f'save_stats={save_stats} must end in .npz')
    if num_samples < 0 or n_two_sample < 0 or steps < 0 or batch_size < 1:
        raise M.UserError('num_samples, n_two_sample and steps must be >= 0, batch_size > 0')
    dev, autocast, rank, world = M.init_distributed(device, dtype, seed)
    compute_dtype = M.pick_dtype(dev, dtype)
    # the device for float64, which mps does not have
    exact = torch.device('cpu') if dev.type == 'mps' else dev

    def open_source(spec):
        """The ImageSet that a spec names, or the Samples of a network."""
        spec = student_of(spec)
        if is_images(spec):
            return ImageSet(*M.load_images(spec), batch_size)
        net, diffusion = load_network(spec, compute_dtype, **model_config)
        M.check(num_samples, 'num_samples=0 means all images of a set; a network needs a number')
        net = M.cast_frozen(net.to(dev, memory_format=M.memory_format(dev)), compute_dtype)
        if getattr(net, 'condition', '') == 'text':
            texts = prompts or getattr(net, 'prompts', '')
            M.check(texts, f'{spec} takes texts: --prompts=file.txt')
            net.set_prompts(M.read_lines(texts))
        if diffusion is not None and not getattr(net, 'guided', False):
            M.check_guidance(net, spec, guidance)
        return Samples(
            net, diffusion, num_samples, batch_size, seed, dev, autocast, guidance,
            sampler=sampler, steps=steps, spacing=spacing
        )

    # ---- what is measured, and the features ----
    sources = [open_source(spec) for spec in specs]
    with_encoder = [hasattr(getattr(source, 'net', None), 'encode') for source in sources]
    M.check(not reconstruct or any(with_encoder), 'reconstruct is for VAEs with an encoder')
    to_reconstruct = []  # of each source, or None
    for source, encodes in zip(sources, with_encoder):
        images = None
        if reconstruct and encodes:
            size, C = (getattr(source.net, k, 0) for k in ('image_size', 'in_channels'))
            images = ImageSet(*M.load_images(reconstruct, True, size, C), batch_size)
        to_reconstruct.append(images)
    if specs:
        try:  # now, not after the work
            os.makedirs(out_dir, exist_ok=True)
            open(os.path.join(out_dir, 'metrics.jsonl'), 'a').close()
        except OSError as e:
            raise M.UserError(f'out_dir={out_dir}: {e.strerror}') from e
    ref = stored = None
    ref_source = None
    if not sources or reference and not reference.endswith('.npz'):
        ref_source = open_source(reference)
    of_models = (sources or [ref_source])[0].one().shape[1]
    spec_F, spec_ref = feature_space(features, reference, of_models)
    inception = spec_F == 'inception'
    if inception:
        net_F, space = load_inception(inception_weights)
        net_F = net_F.to(dev)
        in_F = inception_features(net_F)
        channels, sizes = 3, (2048, 1008, 2023)
    else:
        net_F, space, D = M.load_features(spec_F, dev)

        def in_F(x):
            return *M.features(net_F, x), None

        channels, sizes = net_F.in_channels, (D, net_F.num_classes, 0)
    for spec, source in zip(specs, sources):
        made = source.one().shape[1]
        M.check(
            isinstance(source, ImageSet) or made == channels or inception and made == 1,
            f'{spec} makes images of {made} channels, but features={spec_F} takes {channels}: use '
            "a classifier of such images, or 'inception'"
        )
        if isinstance(source, ImageSet) and channels < made and rank == 0:
            print(f'{spec}: colour images are converted to grey')

    def extract(x):
        return in_F(M.with_channels(x, channels).to(dev))

    def first(batches, kept):
        """Yields all batches and keeps images of the first one for the picture."""
        for places, x in batches:
            if not kept:
                kept.append(x[:100])
            yield places, x

    # ---- the reference ----
    if spec_ref.endswith('.npz') and not save_stats:
        stored = M.read_statistics(spec_ref, space)
    if stored:
        fits = stored.get('sigma', stored['mu'][None]).shape == (sizes[0], sizes[0])
        M.check(
            fits, f"{spec_ref}: its 'mu' and 'sigma' are not those of the {sizes[0]} features of "
            f'{space}'
        )
    if stored is None or has_images(spec_ref):
        if ref_source is None:
            ref_source = open_source(spec_ref)
        batches = ref_source.batches(rank, world)
        ref = measure_set(batches, ref_source.n, KEEP[0], extract, sizes, exact, rank == 0)
    if stored and ref and rank == 0:  # as ADM's: statistics of a set, and some of its images
        apart, _ = M.frechet_distance(
            *[v.to(exact) for v in (stored['mu'], stored['sigma'])], ref['mu'], ref['sigma']
        )
        print(
            f"{spec_ref}: the distances are from its stored statistics, precision, recall, KID and "
            f"the like from its {ref['n']:,} images; these two are {apart:.4g} apart"
        )
    elif stored and rank == 0:
        print(
            f'{spec_ref} holds statistics alone: precision, recall, KID, EMD, MMD and 1-NN need '
            'images, --reference=IMAGES'
        )
    if stored:
        ref = {k: v for k, v in (ref or {}).items() if k in ('features', 'logits')} | stored
    moments = {
        k: torch.as_tensor(ref[k], dtype=torch.float64, device=exact)
        for k in ('mu', 'sigma', 'mu_s', 'sigma_s')
        if k in ref
    }
    if save_stats and rank == 0:
        arrays = {k: v.cpu().numpy() for k, v in moments.items()}
        arrays |= {'n': ref['n'], 'space': space, 'features': spec_F}
        M.write_atomically(save_stats, lambda tmp: np.savez(tmp, **arrays))
        print(
            f"{save_stats}: statistics of {ref['n']:,} images of {spec_ref} in the space of "
            f"{space}"
        )

    # ==== the models ====
    table = []
    for spec, source, images in zip(specs, sources, to_reconstruct):
        kept, how = [], {}
        row = {'model': spec}
        if isinstance(source, ImageSet):
            source.take(num_samples)
        batches, total = source.batches(rank, world), source.n
        found = measure_set(first(batches, kept), total, KEEP[1], extract, sizes, exact, rank == 0)
        error = None
        if images:
            error = reconstruction_error(source.net, images.take(num_samples), autocast, dev)
        if rank:
            continue
        if isinstance(source, Samples):
            row |= source.cost()
            file = M.split_file(spec)[1] or spec
            row['MB'] = os.path.getsize(file) / 2**20 if file.endswith(M.WEIGHTS) else None
            if source.diffusion:
                how = source.how
        row['images'] = total
        row['FID' if inception else 'Frechet'], singular = M.frechet_distance(
            found['mu'], found['sigma'], moments['mu'], moments['sigma']
        )
        if 'mu_s' in found and 'mu_s' in moments:
            row['sFID'], _ = M.frechet_distance(
                found['mu_s'], found['sigma_s'], moments['mu_s'], moments['sigma_s']
            )
        row['IS' if inception else 'score'] = inception_score(found['logits'])
        if how and source.net.num_classes == sizes[1]:  # both have the same classes
            seen = found['logits'].argmax(1)
            asked = [source.labels(i, source.generator(i)) for i in range(0, len(seen), batch_size)]
            row['agreement'] = float(
                (seen == torch.cat(asked)[: len(seen)].to(exact)).double().mean()
            )
        if 'features' in ref and min(len(ref['features']), total) > NEIGHBOURS:
            real, fake = ref['features'], found['features']
            row['precision'], row['recall'] = precision_recall(real, fake)
            row['KID'] = kid(real, fake[: KEEP[0]])
            n = min(n_two_sample, len(real), len(fake))
            if n > 1:
                row |= two_sample(real[:n], fake[:n])
        if error is not None:
            row['MSE'] = error
        if total <= sizes[0]:
            print(f'{spec}: {total:,} images for {sizes[0]:,} features: the distance is biased')
        elif singular:
            print(f'{spec}: the product of the covariances is near singular, its root inaccurate')
        table.append(row)
        said = dict(
            features=space, reference=spec_ref,
            reference_images=int(ref['n']) if 'n' in ref else None, seed=seed,
            n_two_sample=n_two_sample, device=dev.type, batch_size=batch_size
        )
        with open(os.path.join(out_dir, 'metrics.jsonl'), 'a') as f:
            f.write(json.dumps(row | said | how) + '\n')
        stem = spec.rstrip('/') if os.path.isdir(spec) else os.path.splitext(spec)[0]
        name = stem.replace(os.sep, '_').strip('._')[-100:]
        M.save_grid(os.path.join(out_dir, f'{name}.png'), [M.to_float(kept[0])], 10)
        if how:
            print(
                f"{spec}: {how['sampler']}, {how['steps']} steps, {how['spacing']}, guidance "
                f"{how['guidance']:g}"
            )
    if table:
        columns = {}
        for row in table:
            columns |= dict.fromkeys(row)
        columns = list(columns)
        cells = [columns] + [[written(row.get(k)) for k in columns] for row in table]
        widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
        n = f" ({int(ref['n']):,} images)" if 'n' in ref else ''
        print(f'features of {space}; reference {spec_ref}{n}; seed {seed}')
        for r in cells:
            rest = [c.rjust(w) for c, w in zip(r[1:], widths[1:])]
            print('  '.join([r[0].ljust(widths[0])] + rest))
    M.finish()
