"""
Measures how far the images of a checkpoint, or any set of images, are from a reference: the Frechet distance in the
feature space of a classifier. Several models on one command line give one table.

    python eval_fid.py --models=out/dkdm/student.safetensors,pretrained/mnist_unet.safetensors
    python eval_fid.py --models=images.npz,folder/ --reference=train.npz
    torchrun --nproc_per_node=8 eval_fid.py --models=student.safetensors --num_samples=50000 --reference=cifar10

The statistics of a reference are made once with --save_stats:
    python eval_fid.py --reference=mnist --save_stats=pretrained/mnist_stats.npz
"""
import os
import time

# what is measured
models = ''                  # comma-separated: checkpoints (sampled), .npz files, folders of images, torchvision names
model_config = {}            # what an original checkpoint does not say (models.load_denoiser)
reference = 'pretrained/mnist_stats.npz'  # stored statistics, or images as above
features = 'pretrained/mnist_resnet.safetensors'  # the classifier whose features are compared
save_stats = ''              # write the reference's statistics to this .npz
# sampling
num_samples = 5000           # images of each checkpoint; of sets of images: at most so many, 0 for all
sampler = 'ddpm'             # 'ddpm', 'ddim' or 'dpm++'
steps = 50                   # the paper has 50 of ddpm for pixels, 200 of ddim for latents
guidance = 1.0               # class-conditional checkpoints; their labels are uniform
batch_size = 100             # per rank; also of the classifier
# system
out_dir = 'out/eval'         # a grid of images per model
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 on GPUs that have it), 'bfloat16', 'float32'
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
from tqdm import tqdm

import models as M

specs = [s for s in models.split(',') if s]


def is_images(spec):
    return not spec.endswith(('.safetensors', '.pt', '.pth', '.ckpt', '.bin'))


# ---- check everything before any work starts ----
if not specs and not save_stats:
    M.die('nothing to measure: --models=student.safetensors, an .npz, a folder of images, or several of them with commas')
if num_samples < 0 or batch_size < 1 or sampler not in ('ddpm', 'ddim', 'dpm++'):
    M.die(f"num_samples={num_samples} (0 or more), batch_size={batch_size} (1 or more), sampler={sampler!r} ('ddpm', 'ddim' or 'dpm++')")
device, autocast, rank, world = M.start(device, dtype, seed)
try:
    classifier = M.load_classifier(features).to(device, memory_format=M.memory_format(device))
    space = f'{os.path.basename(features)} {M.digest(classifier)}'             # names the feature space
    channels, side = classifier.config.get('in_channels', 3), classifier.config['image_size']
    with torch.no_grad():
        D = classifier.forward_features(torch.zeros(1, channels, side, side, device=device))[1][-1].shape[1]

    def open_images(spec):
        images, _ = M.load_images(spec)
        if images.shape[1] != channels:
            raise ValueError(f'{spec} has {images.shape[1]} channels, the classifier {features} takes {channels}')
        return images

    inputs = []
    for spec in specs:
        if is_images(spec):
            inputs.append(open_images(spec))
        else:
            net, diffusion = M.load_denoiser(spec, **model_config)
            if net.config['in_channels'] != channels:
                raise ValueError(f"{spec} makes {net.config['in_channels']} channels, the classifier {features} takes {channels}")
            if not 1 <= steps <= diffusion.T:
                raise ValueError(f'steps={steps}: {spec} has from 1 to {diffusion.T}')
            if not num_samples:
                raise ValueError('num_samples=0 takes all images of a set; a checkpoint needs a number')
            inputs.append((net.to(device, memory_format=M.memory_format(device)), diffusion))
    stored = None
    if reference.endswith('.npz') and not save_stats:
        stored = M.read_npz(reference)
        if 'mu' not in stored:
            stored = None
        elif str(stored['space']) != space:
            raise ValueError(f"{reference} holds statistics in the space of {stored['space']}, not of {space}: "
                             'make them again with --save_stats')
    reference_images = open_images(reference) if stored is None else None
except ValueError as e:
    M.die(str(e))


@torch.inference_mode()
def statistics(batches, total):
    """(mean (D,), covariance (D, D), count) of the features of all ranks' batches, accumulated in float64."""
    s, ss, count = torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64), 0
    for x in tqdm(batches, total=total, disable=rank > 0, leave=False):
        # the mean of the last feature map is what the classifier's linear layer sees
        f = classifier.forward_features(M.preprocess(classifier, x.to(device)))[1][-1].mean((2, 3)).double().cpu()
        s, ss, count = s + f.sum(0), ss + f.T @ f, count + len(f)
    if world > 1:
        packed = torch.cat([s, ss.flatten(), torch.tensor([float(count)], dtype=torch.float64)]).to(device)
        dist.all_reduce(packed)
        s, ss, count = packed[:D].cpu(), packed[D:-1].view(D, D).cpu(), round(packed[-1].item())
    mu = s / count
    return mu.numpy(), ((ss - count * torch.outer(mu, mu)) / max(1, count - 1)).numpy(), count


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Heusel et al. 2017, Eq. (6).

    The trace of the root is the sum of the roots of the product's eigenvalues, which are real and not negative
    up to rounding.
    """
    eigenvalues = scipy.linalg.eigvals(sigma1 @ sigma2).real.clip(min=0)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * np.sqrt(eigenvalues).sum())


def image_batches(images):
    """This rank's share of a set of images."""
    for i in range(rank * batch_size, len(images), world * batch_size):
        yield M.to_float(images[i:i + batch_size])


def sample_batches(net, diffusion, seconds):
    """This rank's share of the samples. A block of batch_size images has a seed of its own, whichever rank makes it."""
    C, H = (net.config[k] for k in ('in_channels', 'image_size'))
    for block in range(rank, -(-num_samples // batch_size), world):
        size = min(batch_size, num_samples - block * batch_size)
        g = torch.Generator(device).manual_seed(seed * 1_000_003 + block)
        y = torch.randint(net.num_classes, (size,), generator=g, device=device) if net.num_classes else None
        t0 = time.time()
        with autocast:
            x = M.sample(net, diffusion, (size, C, H, H), steps, sampler, y, guidance, g)
        seconds.append((time.time() - t0, size))
        yield M.to_float(M.to_uint8(x))                                        # what a file of images would hold


def first(batches, kept):
    """Passes batches on and keeps the first for the picture."""
    for x in batches:
        if not kept:
            kept.append(x[:100].cpu())
        yield x


# ---- the reference ----
if stored is None:
    mu_ref, sigma_ref, count_ref = statistics(image_batches(reference_images), -(-len(reference_images) // batch_size // world))
else:
    mu_ref, sigma_ref, count_ref = stored['mu'], stored['sigma'], int(stored['n'])
if save_stats and rank == 0:
    M.write_atomically(save_stats, lambda tmp: np.savez(tmp, mu=mu_ref, sigma=sigma_ref, n=count_ref, space=space))
    print(f'{save_stats}: statistics of {count_ref:,} images of {reference} in the space of {space}')

# ---- the models ----
if rank == 0 and specs:
    print(f'Frechet distance in the features of {space} to {reference} ({count_ref:,} images); '
          f'checkpoints: {sampler}, {steps} steps, seed {seed}')
    print(f'{"model":<48}{"parameters":>12}{"images":>9}{"distance":>10}{"ms/image":>10}')
for spec, source in zip(specs, inputs):
    kept, seconds = [], []
    if is_images(spec):
        images = source[:num_samples] if num_samples else source
        batches, total, parameters = image_batches(images), len(images), ''
    else:
        batches, total, parameters = sample_batches(*source, seconds), num_samples, f'{sum(p.numel() for p in source[0].parameters()):,}'
    mu, sigma, count = statistics(first(batches, kept), -(-total // batch_size // world))
    if rank == 0:
        ms = f'{1000 * sum(s for s, _ in seconds) / sum(k for _, k in seconds):.2f}' if seconds else ''
        print(f'{spec:<48}{parameters:>12}{count:>9,}{frechet_distance(mu, sigma, mu_ref, sigma_ref):>10.3f}{ms:>10}')
        if count <= len(mu):
            print(f'  (only {count} images for {len(mu)} features: the covariance is singular and the distance biased)')
        name = os.path.splitext(spec.rstrip('/'))[0].replace(os.sep, '_').strip('._')
        M.save_grid(os.path.join(out_dir, f'{name}.png'), kept[0], 10)
if world > 1:
    dist.destroy_process_group()
