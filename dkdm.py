"""
DKDM: trains a small diffusion model of any architecture from a large pretrained one, without its
training data. The student learns from the teacher's own denoising steps (Xiang et al.,
CVPR 2025, arXiv 2409.03550).

    python dkdm.py  # the bundled MNIST teacher, minutes on a laptop
    python dkdm.py config/dkdm_cifar10.py --teacher=cifar10_32.pt    # the paper's CIFAR-10 setting
    # networks of your own (docs/reference.md)
    python dkdm.py --teacher=my_teacher.py --student=my_student.py
    torchrun --nproc_per_node=8 dkdm.py config/dkdm_cifar10.py --rho=0.4
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        dkdm.py config/dkdm_cifar10.py
    # ordinary training on images makes a teacher
    python dkdm.py config/mnist_teacher.py --data=mnist
"""
import os

# teacher
teacher = 'pretrained/mnist_classes.safetensors'  # a file of ours, an original ADM, DDPM-IP, DKDM,
                             # LDM or DiT checkpoint, a diffusers folder or hub id, or a Python file
                             # with load()
teacher_config = {}          # what an original checkpoint does not record: image_size, ...
                             # (adapters/original.py)
guidance = 0.0               # guidance scale at which a conditional teacher is distilled; 1 is
                             # no guidance, 0 is 2 for conditional teachers and 1 for others
prompts = ''                 # text-conditional teachers: a file of texts, one per line
# student
student = 'unet'             # 'unet' or 'dit', whatever the teacher is; 'teacher', a copy of the
                             # teacher; a Python file with build(); or the config.json of a network
                             # of diffusers
student_config = {}          # its sizes, where they differ from adapters/students.py
                             # (--student_config.model_channels=64); learn_sigma=False for one that
                             # does not predict its variance, Eq. (12); lora_rank=64 for LoRA
                             # adapters of a copy of the teacher, a pipeline with texts
student_prediction = 'v'     # 'v', 'eps', 'x0', 'flow', or 'teacher': the same as the teacher's
                             # (the paper)
# distillation
method = 'dynamic'           # 'dynamic' (the paper's), 'shuffled', 'iterative' (its ablations),
                             # 'noised' (the teacher's outputs on noised images, Eqs. (14)-(16)),
                             # 'synthetic' (train on images that the teacher made before),
                             # 'data' (ordinary training, no teacher)
rho = 0.4                    # the pool holds round(rho T / stride) batches of half-finished images
stride = 40                  # timesteps by which a visit moves an image, on average; the paper: 1
warmup_steps = 0             # teacher steps of a whole walk from noise to image while the pool
                             # is filled; 0 is T / stride, the paper: T
lam = 0.001                  # weight of L_vlb, Eq. (19)
uncond_prob = 0.0            # conditional students: how often the condition is replaced by the
                             # null condition in training
# images, for 'data', 'noised' and 'synthetic'
data = ''                    # an .npz, an .npy, a folder, or a torchvision name
synthetic = {'images': '', 'number': 2000, 'steps': 50, 'real_fraction': 0.0}  # 'synthetic': a set
                             # made earlier, or how many images are made now, in how many steps;
                             # the fraction that is replaced by real ones, from `data`
flip = False                 # random horizontal flips
class_cond = False           # 'data': condition on the labels
process = {'schedule': 'cosine', 'steps': 1000}  # 'data': 'cosine', 'linear', 'sqrt_linear' or
                             # 'flow', and its T; otherwise the teacher's
# optimisation
max_steps = 1000
batch_size = 32              # over all ranks and accumulation steps
grad_accum = 1               # accumulation steps
lr = 4e-3
lr_warmup = 50               # steps of linear warm-up
lr_decay = True              # cosine decay to 0 at max_steps
adamw = {'beta2': 0.99, 'weight_decay': 0.0}
grad_clip = 1.0              # largest norm of the gradient; 0 for none
ema = 0.999                  # decay of the averaged weights, which are the result
# choosing a checkpoint: log.csv gets the Frechet distance of 1,000 images of the averaged student,
# and best.safetensors the student with the smallest
eval_every = 0               # steps between distances; 0 is never
eval_reference = ''          # statistics made by eval_fid.py --save_stats, of the data or of the
                             # teacher's own samples; '' is the bundled ones of MNIST or CIFAR-10
# system
out_dir = 'out/dkdm'
init_from = 'scratch'        # 'scratch'; 'resume'; 'overwrite' begins anew where an unfinished run
                             # lies; a student's file to start from; or 'teacher': all tensors of
                             # the teacher that fit (docs/reference.md)
log_every = 20               # steps between rows of log.csv
save_every = 1000            # steps between checkpoints (with samples.png)
sample_steps = 8             # DDIM steps of samples.png and of the distances
seed = 0
device = 'auto'              # 'auto', 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16',
                             # 'float32'
compile = False              # torch.compile of each kind of block, for GPUs
graph = True                 # on one GPU: the whole step as one CUDA graph
wandb = ''                   # a Weights & Biases project, '' for none
_ranges = {                  # allowed values of string settings
    'method': ('dynamic', 'shuffled', 'iterative', 'noised', 'synthetic', 'data'),
    'student_prediction': ('v', 'eps', 'x0', 'flow', 'teacher'),
    'dtype': ('auto', 'bfloat16', 'float32')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import contextlib
import copy
import math
import random
import shlex
import time

import numpy as np
import torch
from tqdm import tqdm

import models as M

students = M.adapter('students')


# ==== the method ====
#   pool <- rho T / stride batches, each image walked from noise to its own t  Alg. 1, line 1
#   repeat:
#       x_t, t <- any batch of the pool                                                            4
#       out_T = teacher(x_t, t);  out = student(x_t, t)
#       student <- student - lr grad |out - out_T|^2 + lam KL(p_T || p_S)        5-7, Eqs. (19)-(21)
#       x_s ~ p_T(x_s | x_t), s = t - stride: the teacher's own step moves the images              8
#       finished images leave the pool, fresh noise enters it
class Pool:
    """Partially denoised images x (N, C, H, W) of the teacher's walks, each at its own time t (N,):
    Alg. 1's enlarged batch. `shape` is (C, H, W); draw_labels(n) gives the conditions y of new
    images, or None."""

    def __init__(self, size, shape, diffusion, draw_labels=lambda n: None, device='cpu'):
        self.diffusion = diffusion
        self.draw_labels = draw_labels
        self.x = torch.randn(size, *shape, device=device)
        self.t = torch.full((size,), diffusion.T - 1, device=device)
        self.y = draw_labels(size)
        self.goal = torch.zeros_like(self.t)  # to which times `fill` walks
        self.filled = 0  # so many of its steps are done

    @torch.no_grad()
    def fill(
        self, teacher, steps, chunk, same_t=False, progress=True, stopping=lambda: False
    ):
        """Line 1, shuffled denoise: every image walks from noise to its own t, drawn uniformly from
        0 ... T-1; if `same_t`, all stay at T-1. A whole walk would take `steps` steps; `chunk`
        images are evaluated at once. It ends before the next step once stopping() is true, and goes
        on there when it is called again. Returns the number of teacher evaluations."""
        size, T = len(self.x), self.diffusion.T
        if same_t:
            return 0
        if self.filled == 0:
            self.goal.copy_(torch.randint(T, (size,)).sort().values)
        # goals are sorted, so the first n images still walk at t
        walking_at = torch.searchsorted(self.goal, torch.arange(T).to(self.goal)).tolist()
        levels = torch.linspace(T - 1, -1, steps + 1).round().long().tolist()
        pairs = list(zip(levels, levels[1:]))
        evaluations = 0
        bar = tqdm(
            pairs[self.filled :], desc='filling the pool', disable=not progress, leave=False,
            total=steps, initial=self.filled
        )
        for t, s in bar:
            if stopping():
                break
            for i in range(0, walking_at[t], chunk):  # some of a chunk are at their goal
                x_t = self.x[i : i + chunk]
                x_goal = self.goal[i : i + chunk]
                tt = torch.full_like(x_goal, t)
                y = None if self.y is None else self.y[i : i + chunk]
                x_s = self.diffusion.ddpm_step(teacher(x_t, tt, y), x_t, tt, x_goal.clamp(min=s))
                walking = x_goal < t
                self.x[i : i + chunk] = torch.where(walking.view(-1, 1, 1, 1), x_s, x_t)
                self.t[i : i + chunk] = torch.where(
                    walking, x_goal.clamp(min=s), self.t[i : i + chunk]
                )
                evaluations += chunk
            self.filled += 1
        bar.close()
        return evaluations

    def draw(self, n):
        """Line 4: n images drawn at random without replacement, (idx, x_t, t, y)."""
        device = self.x.device
        idx = torch.arange(n, device=device)
        if n < len(self.x) and device.type == 'cpu':
            idx = torch.randperm(len(self.x))[:n]
        elif n < len(self.x):  # a GPU's randperm would wait for the host
            idx = torch.rand(len(self.x), device=device).argsort()[:n]
        y = None if self.y is None else self.y[idx]
        return idx, self.x[idx], self.t[idx], y

    def advance(self, idx, x_s, s):
        """Line 8: the images `idx` move on to (x_s, s). Where s = -1 an image is finished and
        replaced by fresh noise at T-1."""
        done = s < 0
        self.x[idx] = torch.where(done.view(-1, 1, 1, 1), torch.randn_like(x_s), x_s)
        self.t[idx] = torch.where(done, self.diffusion.T - 1, s)
        if self.y is not None:
            self.y[idx] = torch.where(done, self.draw_labels(len(idx)), self.y[idx])

    def state(self):
        return {'x': self.x, 't': self.t, 'y': self.y, 'goal': self.goal, 'filled': self.filled}

    def load(self, state):
        """Takes over a state, in the memory that a CUDA graph knows."""
        self.filled = state.get('filled', self.diffusion.T)
        for name in ('x', 't', 'y', 'goal'):
            if state.get(name) is not None:
                getattr(self, name).copy_(state[name])


def distill_step(
    student, teacher, pool, diffusion, batch_size, stride=1, lam=0.001, distance=None,
    autocast=contextlib.nullcontext(), loss_scale=1.0
):
    """Lines 4-8 of Alg. 1: adds the gradient of the student's loss on one batch of the pool, and
    moves the batch on.

    The output of teacher(x_t, t, y) is a prediction of pool.diffusion, the student's one of
    `diffusion`. distance: how far all images move; None draws one around `stride` for each.
    Returns the loss terms, {name: mean}.
    """
    idx, x_t, t, y = pool.draw(batch_size)
    out_T = teacher(x_t, t, y)
    with autocast:
        out = student(x_t, t, y)
    target = pool.diffusion.convert(out_T, x_t, t, diffusion.prediction)
    losses = diffusion.distill_loss(out, target, x_t, t, lam)  # Eqs. (19)-(21)
    terms = {'mse': losses['mse'], 'vb': losses['vb']}  # add a loss of your own here: shape (B,)
    terms = M.mean_and_backward(terms, loss_scale)

    # the same evaluation moves the teacher's walk: x_t -> x_s
    if distance is None:
        low, high = (stride + 1) // 2, stride + stride // 2
        distance = torch.randint(low, high + 1, t.shape, device=t.device)
    s = (t - distance).clamp(min=-1)
    pool.advance(idx, pool.diffusion.ddpm_step(out_T, x_t, t, s), s)
    return terms


# ==== training on images: teachers, and the baselines of the paper ====
class Images:
    """A set of uint8 images (N, C, H, W) with labels (N,) or None. They stay where they are; what
    is drawn is on `device`."""

    def __init__(self, images, labels, uncond_prob=0.0, flip=False, device='cpu'):
        self.images = images
        self.labels = labels
        self.uncond_prob = uncond_prob
        self.flip = flip
        self.device = device

    def draw(self, n):
        """n random images as floats in [-1, 1], (x_0, y)."""
        idx = torch.randint(len(self.images), (n,), device=self.images.device)
        x0 = M.to_float(self.images[idx].to(self.device))
        y = None
        if self.labels is not None:
            y = self.labels[idx].to(self.device)
            y = torch.where(torch.rand(n, device=self.device) < self.uncond_prob, -1, y)
        if self.flip:
            flipped = torch.rand(n, 1, 1, 1, device=self.device) < 0.5
            x0 = torch.where(flipped, x0.flip(-1), x0)
        return x0, y


def training_step(
    student, images, diffusion, batch_size, lam=0.001, autocast=contextlib.nullcontext(),
    loss_scale=1.0, teacher=None, diffusion_T=None
):
    """Training on images noised to a uniform t: with their own noise and pixels as the target,
    Eq. (13), or if a teacher is given with its output, Eqs. (14)-(16). Returns the loss terms,
    {name: mean}."""
    x0, y = images.draw(batch_size)
    t = torch.randint(diffusion.T, (batch_size,), device=x0.device)
    noise = torch.randn_like(x0)
    x_t = diffusion.q_sample(x0, t, noise)
    with autocast:
        out = student(x_t, t, y)
    if teacher is None:
        losses = diffusion.training_loss(out, x0, x_t, t, noise, lam)
    else:
        target = diffusion_T.convert(teacher(x_t, t, y), x_t, t, diffusion.prediction)
        losses = diffusion.distill_loss(out, target, x_t, t, lam)
    return M.mean_and_backward({'mse': losses['mse'], 'vb': losses['vb']}, loss_scale)


@torch.no_grad()
def make_images(path, net, diffusion, n, steps, guidance, chunk, autocast, progress=True):
    """Data-Free Training: writes n images of the teacher, `chunk` at a time, and their labels, to
    an .npz."""
    shape = net.in_channels, net.image_size, net.image_size
    draw_labels = M.make_labels(net.num_classes, device=next(net.parameters()).device)
    arrays = {'arr_0': [], 'arr_1': []}
    for i in tqdm(range(0, n, chunk), desc='making images', disable=not progress, leave=False):
        size = min(chunk, n - i)
        y = draw_labels(size)
        with autocast:
            x = M.sample(net, diffusion, (size, *shape), steps, 'ddpm', y, guidance, spacing='even')
        arrays['arr_0'].append(M.to_uint8(x).permute(0, 2, 3, 1).cpu())
        if y is not None:
            arrays['arr_1'].append(y.cpu())
    arrays = {k: torch.cat(v).numpy() for k, v in arrays.items() if v}
    M.write_atomically(path, lambda tmp: np.savez_compressed(tmp, **arrays))


def with_real(images, labels, data, fraction, seed):
    """Data-Limited Training: replaces the fraction by images of `data`. Labels are kept if both
    sets have them. Raises UserError if `data` has too few."""
    real, real_labels = M.load_images(data, channels=images.shape[1])
    wanted = round(fraction * len(images))
    M.check(
        wanted <= len(real),
        f'real_fraction={fraction} of {len(images)} images is {wanted}, but {data} has only '
        f'{len(real)}'
    )
    g = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(real), generator=g)[:wanted]
    kept = torch.randperm(len(images), generator=g)[wanted:]
    images = torch.cat([images[kept], real[picked]])
    if labels is None or real_labels is None:
        return images, None
    return images, torch.cat([labels[kept], real_labels[picked]])


# ==== choosing a checkpoint ====
def load_space(reference, channels, device):
    """(classifier, statistics) from a file of eval_fid.py --save_stats, which names the classifier;
    '' is the bundled one for images of so many channels. Raises UserError."""
    features, usual = M.SPACES[channels]
    reference = reference or usual
    with M.open_npz(reference) as z:
        features = str(z['features']) if 'features' in z else features
    net, space, _ = M.load_features(features, device)
    statistics = M.read_statistics(reference, space)
    M.check(statistics is not None, f'{reference} holds no statistics: eval_fid.py --save_stats')
    M.check(
        net.in_channels == channels,
        f'{reference} is of images with {net.in_channels} channels, not {channels}'
    )
    return net, statistics


@torch.no_grad()
def distance_of(net, diffusion, decoder, steps, space, seed, autocast):
    """The Frechet distance of 1,000 images, always from the same noise, to the statistics of
    `space` (`load_space`)."""
    net_F, reference = space
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    found = []
    for _ in range(10):
        y = None
        if net.num_classes:
            y = torch.randint(net.num_classes, (100,), generator=generator, device=device)
        shape = 100, net.in_channels, net.image_size, net.image_size
        with autocast:
            x = M.decode(decoder, M.sample(net, diffusion, shape, steps, 'ddim', y, 1.0, generator))
        found.append(M.features(net_F, M.to_uint8(x))[0].cpu().double())
    f = torch.cat(found)
    return M.frechet_distance(f.mean(0), f.T.cov(), reference['mu'], reference['sigma'])[0]


# ==== set-up ====
if __name__ == '__main__':
    config = {k: globals()[k] for k in _defaults}
    M.check(min(max_steps, batch_size, grad_accum) > 0, 'max_steps, batch_size, grad_accum: >= 1')
    M.check(0 <= ema < 1 and 0 <= uncond_prob <= 1, 'ema and uncond_prob must be from 0 to 1')
    M.check(not class_cond or method == 'data', 'class_cond: the teacher says what the classes are')
    mixed = method == 'synthetic' and data
    M.check(mixed or not synthetic['real_fraction'], 'synthetic.real_fraction needs --data=...')
    dev, autocast, rank, world = M.init_distributed(device, dtype, seed)
    micro_batch = M.per_rank(batch_size, world, grad_accum)  # images of one forward pass
    if wandb:
        import wandb as wb

    # ---- teacher, or the images in its place ----
    net_T = diffusion_T = ask_teacher = images = labels = None
    if method in ('data', 'noised'):
        M.check(data, f'method={method!r} needs images: --data=mnist, an .npz or a folder')
        images, labels = M.load_images(data)
    if method == 'data':
        M.check(guidance in (0, 1), "method='data' has no teacher to guide; see eval_fid.py")
        guidance_T, guided = 1.0, False
        C, H = images.shape[1:3]
        M.check(labels is not None or not class_cond, f'class_cond: {data} has no labels')
        num_classes = int(labels.max()) + 1 if class_cond else 0
        process_S = process
    else:
        net_T, diffusion_T, guidance_T = M.load_teacher(
            teacher, teacher_config, guidance, prompts, dev, M.pick_dtype(dev, dtype)
        )
        null = not getattr(net_T, 'no_null', False)
        M.check(null or uncond_prob == 0, f'uncond_prob: {teacher} has no null class to learn from')
        config['teacher_digest'] = net_T.digest
        guided = guidance_T != 1 or getattr(net_T, 'guided', False)
        if rank == 0:
            students.warn_if_y_is_ignored(net_T, teacher, diffusion_T, dev, autocast)
        ask_teacher = M.make_teacher(net_T, guidance_T, autocast)
        C, H = net_T.in_channels, net_T.image_size
        num_classes = net_T.num_classes
        process_S = diffusion_T.config
    draw_labels = M.make_labels(num_classes, uncond_prob, dev)

    # ---- student ----
    net, diffusion = students.build_student(
        student, student_config, student_prediction, (C, H), num_classes, process_S,
        (teacher, teacher_config, net_T) if net_T else None, dev, init_from
    )
    T = diffusion.T
    checkpoint = M.resume(config, rank, net)
    net_ema = copy.deepcopy(net).eval().requires_grad_(False)
    graph_on = graph and dev.type == 'cuda' and world == 1 and method != 'iterative'
    opt = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr, (0.9, adamw['beta2']),
        weight_decay=adamw['weight_decay'], fused=True
    )
    if compile:
        M.compile_blocks(net_T, net)
    model = net
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            net, gradient_as_bucket_view=True, find_unused_parameters=student not in M.DENOISERS
        )
    if eval_every:
        space = load_space(eval_reference, 3 if getattr(net_T, 'vae', None) else C, dev)
    torch.manual_seed(seed * 1000 + rank + 1)  # from here on each rank draws its own random numbers
    begin = time.time()

    # ---- where (x_t, t, target) come from: the source, how it is filled, and the step ----
    evaluations = 0
    walking = method in ('dynamic', 'shuffled', 'iterative')
    if walking:
        M.check(rho > 0 and 1 <= stride <= T, f'rho must be above 0, stride from 1 to T={T}')
        M.check(warmup_steps <= T, f'warmup_steps={warmup_steps}: the teacher has T={T} steps')
        at_once = method == 'iterative'  # moves all images at once
        M.check(grad_accum == 1 or not at_once, "method='iterative': grad_accum must be 1")
        batches = max(1, round(rho * T / stride)) if method == 'dynamic' else 1
        source = Pool(batches * batch_size // world, (C, H, H), diffusion_T, draw_labels, dev)

        def one_batch(loss_scale):
            distance = None
            if at_once:  # all images share one t, on all ranks
                distance = random.Random(step).randint((stride + 1) // 2, stride + stride // 2)
            return distill_step(
                model, ask_teacher, source, diffusion, micro_batch, stride, lam, distance, autocast,
                loss_scale
            )
    else:
        if method == 'synthetic':
            M.check(diffusion_T.clip, f'{teacher} makes latents; a fixed set holds pixels')
            path = os.path.join(out_dir, f'synthetic_rank{rank}.npz')
            if not synthetic['images'] and not checkpoint:  # a resumed run finds them on disk
                n = -(-synthetic['number'] // world)
                evaluations = n * synthetic['steps']
                make_images(
                    path, net_T, diffusion_T, n, synthetic['steps'], guidance_T, micro_batch,
                    autocast, rank == 0
                )
            images, labels = M.load_images(synthetic['images'] or path, channels=C)
            if synthetic['real_fraction']:
                images, labels = with_real(
                    images, labels, data, synthetic['real_fraction'], seed + rank
                )
        shape = tuple(images.shape[1:])
        M.check(shape == (C, H, H), f'the images are {shape}, they must be {(C, H, H)}')
        fits = num_classes == 0 or labels is not None and labels.max() < num_classes
        M.check(fits, f'the images need labels from 0 to {num_classes - 1}')
        source = Images(
            M.on_device(images, dev), M.on_device(labels, dev) if num_classes else None,
            uncond_prob, flip, dev
        )

        def one_batch(loss_scale):
            return training_step(
                model, source, diffusion, micro_batch, lam, autocast, loss_scale,
                ask_teacher if method == 'noised' else None, diffusion_T
            )

    decay = torch.zeros((), device=dev) if graph_on else 0.0  # of the average, at this step

    def one_step():
        """All that a step does on the device: a CUDA graph, where there is a GPU."""
        total = {}
        for i in range(grad_accum):
            if world > 1:
                model.require_backward_grad_sync = i == grad_accum - 1
            for name, value in one_batch(1 / grad_accum).items():
                total[name] = total.get(name, 0.0) + value / grad_accum
        total['grad_norm'] = M.optimizer_step(net, opt, grad_clip)
        M.update_ema(net_ema, net, decay)
        return total

    # ---- results on disk ----
    about = {'guided': guided, 'prompts': prompts}
    about['no_null'] = bool(num_classes) and uncond_prob == 0
    if getattr(net_T, 'vae', None):
        about['vae'] = net_T.source  # the teacher's pipeline
    of_diffusers = getattr(net, 'dtype_as_loaded', False)
    if of_diffusers:
        about['pipeline'] = getattr(net_T, 'source', '')
    about['sampling'] = dict(sampler='ddim', steps=sample_steps, spacing='trailing')
    last_pictures = time.time()

    def save_student(name='student.safetensors'):
        M.save_model(net_ema, os.path.join(out_dir, name), diffusion, **about)

    def save_checkpoint():
        shared = {'ema': net_ema.state_dict(), 'evaluations': evaluations, 'best': best}
        own = {'pool': source.state() if walking else {}, 'sums': meter.sums}
        M.save_checkpoint(config, step, net, opt, shared, own, rank, step == max_steps)

    def save_pictures(seconds_per_pass):
        global last_pictures
        rows = [(net_ema, diffusion, 1.0, sample_steps, 'ddim')]
        if net_T is not None:
            rows.insert(0, (net_T, diffusion_T, guidance_T, sample_steps, 'ddim'))
        path = os.path.join(out_dir, 'samples.png')
        M.save_samples(path, rows, net_T, seed, autocast, seconds_per_pass, last_pictures)
        last_pictures = time.time()

    # ---- where a run begins, or goes on ----
    stop = M.StopFlag()
    step, best = 0, math.inf
    meter = M.Meter(dev)
    if checkpoint:
        shared, own = M.restore(checkpoint, opt)
        step, best = shared['step'], shared['best']
        evaluations = shared['evaluations']
        meter = M.Meter(dev, own['sums'])
        net_ema.load_state_dict(shared['ema'])
        if walking:
            source.load(own['pool'])
        del shared, own  # they would stay in memory
    else:
        M.set_aside(out_dir, rank)
    if walking and step == 0:
        evaluations += source.fill(
            ask_teacher, warmup_steps or max(1, T // stride), micro_batch, at_once, rank == 0,
            lambda: M.all_reduce_max(stop.signal)
        )
    if not checkpoint and method != 'data' or walking and step == 0:
        save_checkpoint()  # so that the walks or the synthetic images are not lost
    checkpoint = None  # it would stay in memory
    leaving = M.all_reduce_max(stop.signal)
    if leaving and walking and step == 0:
        if rank == 0:
            print('stopped before the first step; what the teacher walked so far is saved')
        M.finish(leaving)
    if rank == 0:
        print(f'student {student}: {M.size_of(net)}, predicts {diffusion.prediction}')
        if net_T is not None:
            print(f'teacher {teacher}: {M.size_of(net_T)}, predicts {diffusion_T.prediction}')
        print(
            f'{method}, {max_steps:,} steps of {batch_size} images of {C}x{H}x{H} on {world} x '
            f'{dev.type}, guidance {guidance_T:g}; {evaluations * world:,} teacher evaluations '
            'before the first step'
        )
        log = M.Log(os.path.join(out_dir, 'log.csv'), step)
        if wandb:
            wb.init(project=wandb, name=os.path.basename(out_dir), config=config)
    run_step = M.Graphed(one_step, dev, graph_on, opt)
    net.train()
    first = step
    start = time.time()  # of the loop; `seconds` in log.csv includes filling the pool
    paused = 0.0  # seconds spent on pictures and distances
    bar = tqdm(total=max_steps, initial=step, disable=rank > 0, mininterval=1)

    # ==== the loop ====
    while step < max_steps:
        rate = lr * M.learning_rate_factor(step, max_steps, lr_warmup, lr_decay)
        M.set_learning_rate(opt, rate)
        now = min(ema, (1 + step) / (10 + step))
        decay = decay.fill_(now) if graph_on else now
        meter.add(run_step())
        step += 1
        bar.update()
        if world == 1 or step % 5 == 0:
            leaving = M.all_reduce_max(stop.signal)
        saving = step % save_every == 0 or step == max_steps or leaving
        evaluating = eval_every and (step % eval_every == 0 or step == max_steps)
        logging = step % log_every == 0 or step == max_steps or evaluating
        if logging or saving:
            means = meter.means(step, net, save_checkpoint, f'try a smaller --lr (now {rate:.2g})')
        if logging and rank == 0:
            norm = means.pop('grad_norm')
            row = dict(step=step, loss=sum(means.values()), **means, grad_norm=norm, lr=rate)
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            before = time.time()
            if eval_every:
                row['frechet'] = ''
            if evaluating:
                row['frechet'] = distance_of(
                    net_ema, diffusion, net_T, sample_steps, space, seed, autocast
                )
                if row['frechet'] < best:
                    best = row['frechet']
                    save_student('best.safetensors')
            paused += time.time() - before
            seconds = time.time() - start - paused
            row['images_per_s'] = (step - first) * batch_size / seconds
            row['seconds'] = log.seconds + start - begin + seconds
            log(**row)
            if wandb:
                wb.log({k: v for k, v in row.items() if v != ''}, step=step)
        if logging:
            meter.clear()
        if saving:
            save_checkpoint()  # first: after SIGTERM there may be little time
            if rank == 0:
                before = time.time()
                save_student()
                if not leaving:
                    with stop.interrupts():
                        save_pictures((before - start - paused) / (step - first) / batch_size)
                paused += time.time() - before
        if leaving:
            break
    bar.close()
    if rank == 0:
        students.warn_if_y_is_ignored(net_ema, 'the student', diffusion, dev, autocast)
        if step == first:  # killed after the last checkpoint, before the result was saved
            save_student()
        path = os.path.join(out_dir, 'student.safetensors')
        spec = f'{student}:{path}' if student.endswith('.py') else path
        seconds = time.time() - begin + log.seconds
        print(f'step {step} of {max_steps}, {seconds:.0f} s; student: {spec}')
        print('evaluate: python ' + shlex.join(['eval_fid.py', f'--models={spec}']))
        if of_diffusers:
            command = ['export.py', f'--model={path}', f'--out_dir={out_dir}/pipeline']
            print('for diffusers: python ' + shlex.join(command))
        if wandb:
            wb.finish()
    M.finish(leaving)
