"""
DKDM: trains a small diffusion model of any architecture from a large pretrained one, without its
training data. The student learns from the teacher's own denoising steps (Xiang et al.,
CVPR 2025, arXiv 2409.03550).

    python dkdm.py  # the bundled MNIST teacher, minutes on a laptop
    python dkdm.py config/dkdm_cifar10.py --teacher=cifar10_32.pt    # the paper's CIFAR-10 setting
    python dkdm.py config/dkdm_mnist_one_step.py  # a student that makes a digit in one evaluation
    # networks of your own (docs/reference.md)
    python dkdm.py --teacher=my_teacher.py --student=my_student.py
    torchrun --nproc_per_node=8 dkdm.py config/dkdm_cifar10.py --rho=0.4
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 dkdm.py ...
    # ordinary training on images makes a teacher
    python dkdm.py config/mnist_teacher.py --data=mnist
"""
import os

# teacher
teacher = 'pretrained/mnist_classes.safetensors'  # a file of ours, an original ADM, DDPM-IP, DKDM,
                             # LDM or DiT checkpoint, a diffusers folder or hub id, or a Python file
                             # with load()
teacher_config = {}          # what an original checkpoint does not record: image_size, ...
                             # (models.load_denoiser)
guidance = 0.0               # guidance scale at which a conditional teacher is distilled; 1 is
                             # no guidance, 0 is 2 for conditional teachers and 1 for others
prompts = ''                 # text-conditional teachers: a file of texts, one per line
# student
student = 'unet'             # 'unet' or 'dit', whatever the teacher is; a Python file with build();
                             # or the config.json of a network of diffusers
student_config = {}          # its sizes, where they differ from SIZES (below):
                             # --student_config.model_channels=64
student_prediction = 'v'     # 'v', 'eps', 'x0', 'flow', or 'teacher': the same as the teacher's
                             # (the paper)
learn_sigma = True           # the student predicts its variance too, Eq. (12)
# distillation
method = 'dynamic'           # 'dynamic' (the paper's), 'shuffled', 'iterative' (its ablations),
                             # 'synthetic' (train on images that the teacher made before),
                             # 'data' (ordinary training, no teacher), 'jumps' (few-step
                             # students)
rho = 0.4                    # the pool holds round(rho T / stride) batches of half-finished images
stride = 40                  # timesteps by which a visit moves an image, on average; the paper: 1
warmup_steps = 0             # teacher steps of a whole walk from noise to image while the pool
                             # is filled; 0 is T / stride, the paper: T
pool_dtype = 'float32'       # 'float32', 'float16' or 'bfloat16'
lam = 0.001                  # weight of L_vlb, Eq. (19)
uncond_prob = 0.0            # conditional students: how often the condition is replaced by the
                             # null condition in training
# few-step students, 'jumps'
jumps = 1                    # evaluations of the student per image
walks = 2048                 # finished walks of the teacher in the pool, over all ranks
walk_steps = 16              # teacher evaluations per walk, a multiple of jumps
jump_loss = 'l1'             # 'l1' (absolute error, clearer images) or 'l2' (squared error)
refine = False               # every evaluation aims at the end of the walk, and starts where the
                             # student's own earlier ones arrive
walk_evals = 0               # teacher evaluations per training step, which make new walks to
                             # replace the oldest; 0: the pool stays as it is
walks_start = 1.0            # fraction of the pool that is filled before the first step
# images, for 'data' and 'synthetic'
data = ''                    # an .npz, a folder, or a torchvision name; with real_fraction: the
                             # real images
synthetic = ''               # 'synthetic': images made earlier; '' makes them now
synthetic_images = 2000      # how many to make
synthetic_steps = 50         # sampling steps of each
real_fraction = 0.0          # fraction of the synthetic set that is replaced by real images
                             # (Data-Limited Training)
flip = False                 # random horizontal flips
class_cond = False           # 'data': condition on the labels
schedule = 'cosine'          # 'data': 'cosine', 'linear', 'sqrt_linear', 'flow'; otherwise the
                             # teacher's
T = 1000                     # 'data': steps of the process; otherwise the teacher's
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
# choosing a checkpoint: log.csv gets the Frechet distance of 1,000 images of the EMA student, and
# best.safetensors the student with the smallest. Reference statistics are made from data, or from
# the teacher's own samples (eval_fid.py)
eval_every = 0               # steps between distances; 0 is never
eval_reference = 'pretrained/mnist_stats.npz'    # statistics made by eval_fid.py --save_stats
eval_features = 'pretrained/mnist_resnet.safetensors'  # in the features of this classifier
# system
out_dir = 'out/dkdm'
init_from = 'scratch'        # 'scratch', 'resume', or a student's file to start from
log_every = 20               # steps between rows of log.csv
save_every = 1000            # steps between checkpoints (with samples.png)
sampler = 'ddim'             # of samples.png and eval_every: 'ddpm', 'ddim' or 'dpm++'
sample_steps = 0             # evaluations per image; 0 is 8, or the student's jumps. The paper
                             # takes 50 of ddpm for pixels, 200 of ddim for latents
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16',
                             # 'float32'
compile = False              # torch.compile, for GPUs
wandb = ''                   # a Weights & Biases project, '' for none
_ranges = {                  # allowed values of string settings
    'method': ('dynamic', 'shuffled', 'iterative', 'synthetic', 'data', 'jumps'),
    'jump_loss': ('l1', 'l2'),
    'student_prediction': ('v', 'eps', 'x0', 'flow', 'teacher'),
    'sampler': ('ddpm', 'ddim', 'dpm++'),
    'schedule': ('cosine', 'linear', 'sqrt_linear', 'flow'),
    'pool_dtype': ('float32', 'float16', 'bfloat16'),
    'dtype': ('auto', 'bfloat16', 'float32')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import contextlib
import copy
import inspect
import json
import math
import random
import shlex
import time

import numpy as np
import torch
from tqdm import tqdm

import models as M


# ==== the method ====
#   pool <- rho T / stride batches, each image walked from noise to its own t  Alg. 1, line 1
#   repeat:
#       x_t, t <- any batch of the pool                                                            4
#       out_T = teacher(x_t, t);  out = student(x_t, t)
#       student <- student - lr grad |out - out_T|^2 + lam KL(p_T || p_S)        5-7, Eqs. (19)-(21)
#       x_s ~ p_T(x_s | x_t), s = t - stride: the teacher's own step moves the images              8
#       finished images leave the pool, fresh noise enters it
def make_teacher(net, guidance=1.0, autocast=contextlib.nullcontext()):
    """teacher(x_t, t, y): the network's guided output (B, C or 2C, H, W) in float32, without
    gradients."""

    @torch.no_grad()
    def teacher(x_t, t, y=None):
        with autocast:
            return M.guided(net, x_t, t, y, guidance).float()

    return teacher


def make_labels(num_classes, uncond_prob=0.0, device='cpu'):
    """draw_labels(n): labels (n,) of new images, -1 for the null condition; None for networks
    without classes."""

    def draw_labels(n):
        if not num_classes:
            return None
        y = torch.randint(num_classes, (n,), device=device)
        return torch.where(torch.rand(n, device=device) < uncond_prob, -1, y)

    return draw_labels


class Pool:
    """Partially denoised images x (N, C, H, W) of the teacher's walks, each at its own time t (N,):
    Alg. 1's enlarged batch. `shape` is (C, H, W); draw_labels(n) gives the conditions y of new
    images, or None."""

    def __init__(
        self, size, shape, diffusion, draw_labels=lambda n: None, dtype=torch.float32, device='cpu'
    ):
        self.diffusion = diffusion
        self.draw_labels = draw_labels
        self.x = torch.randn(size, *shape, device=device).to(dtype)
        self.t = torch.full((size,), diffusion.T - 1, device=device)
        self.y = draw_labels(size)

    @torch.no_grad()
    def fill(self, teacher, steps, chunk, same_t=False, progress=True):
        """Line 1, shuffled denoise: every image walks from noise to its own t, drawn uniformly from
        0 ... T-1; if `same_t`, all stay at T-1. A whole walk would take `steps` steps; `chunk`
        images are evaluated at once. Returns the number of teacher evaluations."""
        size, T = len(self.x), self.diffusion.T
        if same_t:
            return 0
        goal = torch.randint(T, (size,)).sort().values
        # goals are sorted, so the first n images still walk at t
        walking_at = [int((goal < t).sum()) for t in range(T)]
        goal = goal.to(self.x.device)
        levels = torch.linspace(T - 1, -1, steps + 1).round().long().tolist()
        pairs = list(zip(levels, levels[1:]))
        evaluations = 0
        for t, s in tqdm(pairs, desc='filling the pool', disable=not progress, leave=False):
            for i in range(0, walking_at[t], chunk):  # some of a chunk are at their goal
                x_t = self.x[i : i + chunk].float()
                x_goal = goal[i : i + chunk]
                tt = torch.full_like(x_goal, t)
                y = None if self.y is None else self.y[i : i + chunk]
                x_s = self.diffusion.ddpm_step(teacher(x_t, tt, y), x_t, tt, x_goal.clamp(min=s))
                walking = x_goal < t
                x_s = torch.where(walking.view(-1, 1, 1, 1), x_s, x_t)
                self.x[i : i + chunk] = x_s.to(self.x.dtype)
                self.t[i : i + chunk] = torch.where(
                    walking, x_goal.clamp(min=s), self.t[i : i + chunk]
                )
                evaluations += chunk
        return evaluations

    def draw(self, n):
        """Line 4: n images drawn at random without replacement, (idx, x_t, t, y)."""
        device = self.x.device
        idx = torch.arange(n, device=device)
        if n < len(self.x):
            idx = torch.randperm(len(self.x), device=device)[:n]
        y = None if self.y is None else self.y[idx]
        return idx, self.x[idx].float(), self.t[idx], y

    def advance(self, idx, x_s, s):
        """Line 8: the images `idx` move on to (x_s, s). Where s = -1 an image is finished and
        replaced by fresh noise at T-1."""
        done = s < 0
        x_s = torch.where(done.view(-1, 1, 1, 1), torch.randn_like(x_s), x_s)
        self.x[idx] = x_s.to(self.x.dtype)
        self.t[idx] = torch.where(done, self.diffusion.T - 1, s)
        if self.y is not None:
            self.y[idx] = torch.where(done, self.draw_labels(len(idx)), self.y[idx])

    def state(self):
        return {'x': self.x, 't': self.t, 'y': self.y}

    def load(self, state):
        self.x, self.t, self.y = (v if v is None else v.to(self.x.device) for v in state.values())


def mean_and_backward(terms, scale):
    """Backpropagates the sum of loss terms (B,) times `scale`; returns their means, detached."""
    (sum(terms.values()).mean() * scale).backward()
    return {name: term.detach().mean() for name, term in terms.items()}


def distill_step(
    student, teacher, pool, diffusion, batch_size, stride=1, lam=0.001, jump=None,
    autocast=contextlib.nullcontext(), scale=1.0
):
    """Lines 4-8 of Alg. 1: adds the gradient of the student's loss on one batch of the pool, and
    moves the batch on.

    The output of teacher(x_t, t, y) is a prediction of pool.diffusion, the student's one of
    `diffusion`. jump: how far all images move; None draws a distance around `stride` for each.
    Returns the loss terms, {name: mean}.
    """
    idx, x_t, t, y = pool.draw(batch_size)
    out_T = teacher(x_t, t, y)
    with autocast:
        out = student(x_t, t, y)
    target = pool.diffusion.convert(out_T, x_t, t, diffusion.prediction)
    losses = diffusion.distill_loss(out, target, x_t, t, lam)  # Eqs. (19)-(21)
    terms = {'mse': losses['mse'], 'vb': losses['vb']}  # add a loss of your own here: shape (B,)
    terms = mean_and_backward(terms, scale)

    # the same evaluation moves the teacher's walk: x_t -> x_s
    if jump is None:
        jump = torch.randint((stride + 1) // 2, stride + stride // 2 + 1, t.shape, device=t.device)
    s = (t - jump).clamp(min=-1)
    pool.advance(idx, pool.diffusion.ddpm_step(out_T, x_t, t, s), s)
    return terms


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """ema <- decay ema + (1 - decay) net, where decay is at most (1 + step) / (10 + step). Buffers
    are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in net.parameters()], 1 - decay)
    for b_ema, b in zip(ema.buffers(), net.buffers()):
        b_ema.copy_(b)


def optimizer_step(net, ema_net, opt, grad_clip, ema, step):
    """Clips the gradients, updates the student and its average. Returns the norm of the gradients;
    if it is not finite, the weights do not change."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or float('inf'))
    opt.found_inf = (~norm.isfinite()).float()  # if 1, the fused optimiser skips the step
    opt.step()
    opt.zero_grad(set_to_none=True)
    update_ema(ema_net, net, ema, step)
    return norm


# ==== few-step students: they learn from finished walks ====
#   pool <- deterministic (DDIM) walks of the teacher; jumps + 1 states of each are kept
#   repeat:
#       x_t, x_s <- neighbouring states of randomly drawn walks
#       x_0* = the x_0 whose DDIM step from x_t to s lands on x_s                  Diffusion.jump_x0
#       student <- student - lr grad |out - (x_0* as the student's prediction)|
class Walks:
    """Finished walks of the teacher: x (jumps + 1, N, C, H, W), the states at `times`, from noise
    to image. One batch of walks is always in progress; once finished, it replaces the oldest."""

    def __init__(
        self, size, jumps, steps, shape, diffusion, batch_size, draw_labels=lambda n: None,
        dtype=torch.float32, device='cpu'
    ):
        if jumps < 1 or steps % jumps:
            raise M.UserError(f'walk_steps={steps} must be a multiple of jumps={jumps}')
        size = batch_size * -(-size // batch_size)  # rounded up to whole batches
        self.diffusion = diffusion
        self.draw_labels = draw_labels
        self.batch_size = batch_size
        self.all_times = M.sampling_steps(diffusion.T, steps) + [-1]
        self.every = steps // jumps
        self.times = torch.tensor(self.all_times[:: self.every], device=device)
        self.x = torch.zeros(jumps + 1, size, *shape, dtype=dtype, device=device)
        self.y = torch.full((size,), -1, device=device)
        self.done = 0  # walks finished so far
        self.start()

    def start(self):
        """Starts a new batch of walks from noise."""
        shape = self.batch_size, *self.x.shape[2:]
        self.now = torch.randn(shape, device=self.x.device)
        self.now_y = self.draw_labels(self.batch_size)
        self.states = [self.now]
        self.position = 0

    @torch.no_grad()
    def advance(self, teacher):
        """Moves the batch in progress by one evaluation of the teacher."""
        t, s = self.all_times[self.position : self.position + 2]
        tt = torch.full((self.batch_size,), t, device=self.x.device)
        out = teacher(self.now, tt, self.now_y)
        self.now = self.diffusion.ddim_step(out, self.now, tt, s)
        self.position += 1
        if self.position % self.every == 0:
            self.states.append(self.now)
        if s == -1:
            first = self.done % self.x.shape[1]
            place = slice(first, first + self.batch_size)
            self.x[:, place] = torch.stack(self.states).to(self.x.dtype)
            if self.now_y is not None:
                self.y[place] = self.now_y
            self.done += self.batch_size
            self.start()

    def fill(self, teacher, part=1.0, progress=True):
        """Walks until the fraction `part` of the pool is full, at least one batch. Returns the
        number of teacher evaluations."""
        batches = max(1, round(part * self.x.shape[1] / self.batch_size))
        rounds = range(batches * (len(self.all_times) - 1))
        for _ in tqdm(rounds, desc='the teacher walks', disable=not progress, leave=False):
            self.advance(teacher)
        return len(rounds) * self.batch_size

    def draw(self, n):
        """n random jumps of random walks: (x_t, t, x_s, s, y)."""
        device = self.x.device
        idx = torch.randint(min(self.done, self.x.shape[1]), (n,), device=device)
        k = torch.randint(len(self.x) - 1, (n,), device=device)
        y = None if self.now_y is None else self.y[idx]
        return (
            self.x[k, idx].float(),
            self.times[k],
            self.x[k + 1, idx].float(),
            self.times[k + 1],
            y,
        )

    def state(self):
        names = ('x', 'y', 'done', 'now', 'now_y', 'states', 'position')
        return {name: getattr(self, name) for name in names}

    def load(self, state):
        for name, value in state.items():
            if torch.is_tensor(value):
                value = value.to(self.x.device)
            setattr(self, name, value)
        self.states = [x.to(self.x.device) for x in self.states]


def regress(student, x0, x_t, t, y, diffusion, loss, autocast, scale):
    """Adds the gradient of the error of the student's prediction at (x_t, t, y), where x0 is the
    image to predict; `loss` is 'l1' or 'l2'. Returns the loss terms, {name: mean}."""
    target = diffusion.target(x0, x_t, t, diffusion.prediction)
    with autocast:
        out = student(x_t, t, y)
    error = out[:, : x0.shape[1]].float() - target
    error = error.abs() if loss == 'l1' else error**2
    return mean_and_backward({loss: error.mean((1, 2, 3))}, scale)


def jump_step(
    student, walks, diffusion, batch_size, loss='l1', autocast=contextlib.nullcontext(), scale=1.0
):
    """Adds the gradient of the student's loss, 'l1' or 'l2', on one batch of jumps. Returns the
    loss terms, {name: mean}."""
    x_t, t, x_s, s, y = walks.draw(batch_size)
    x0 = diffusion.jump_x0(x_t, t, x_s, s)
    return regress(student, x0, x_t, t, y, diffusion, loss, autocast, scale)


def refine_step(
    student, ema, walks, diffusion, batch_size, jumps, loss='l1',
    autocast=contextlib.nullcontext(), scale=1.0
):
    """Like jump_step, but every evaluation aims at the image of its walk, and starts where the
    earlier evaluations of `ema`, the student's average, arrive from the walk's noise.

    Evaluation k learns only from the walks whose index is k modulo `jumps`. The evaluations before
    it have not learned from these walks, so what it gets from them has the errors that they make
    on new noise; on their own walks they make hardly any.
    """
    x, n = walks.x, batch_size
    times = M.sampling_steps(walks.diffusion.T, jumps)
    # image i is for evaluation k[i]: as many images for each
    k = torch.arange(n, device=x.device) * jumps // n
    full = min(walks.done, x.shape[1])
    idx = torch.randint(full // jumps, (n,), device=x.device) * jumps + k
    y = None if walks.now_y is None else walks.y[idx]
    x_t, x0 = x[0, idx].float(), x[-1, idx].float()
    t = torch.full_like(k, times[0])
    for j in range(1, jumps):
        later = slice(-(-n * j // jumps), n)  # k >= j
        with torch.no_grad(), autocast:
            out = ema(x_t[later], t[later], None if y is None else y[later])
        x_t[later] = diffusion.ddim_step(out, x_t[later], t[later], times[j])
        t[later] = times[j]
    return regress(student, x0, x_t, t, y, diffusion, loss, autocast, scale)


# ==== training on images: teachers, and the baselines of the paper ====
class Images:
    """A set of uint8 images (N, C, H, W) with labels (N,) or None, on the device."""

    def __init__(self, images, labels, uncond_prob=0.0, flip=False):
        self.images, self.labels = images, labels
        self.uncond_prob, self.flip = uncond_prob, flip

    def draw(self, n):
        """n random images as floats in [-1, 1], (x_0, y)."""
        device = self.images.device
        idx = torch.randint(len(self.images), (n,), device=device)
        x0 = M.to_float(self.images[idx])
        y = None
        if self.labels is not None:
            y = torch.where(torch.rand(n, device=device) < self.uncond_prob, -1, self.labels[idx])
        if self.flip:
            x0 = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x0.flip(-1), x0)
        return x0, y


def training_step(
    student, images, diffusion, batch_size, lam=0.001, autocast=contextlib.nullcontext(), scale=1.0
):
    """Ordinary training, Eq. (13), on images noised to a uniform t. Returns the loss terms, {name:
    mean}."""
    x0, y = images.draw(batch_size)
    t = torch.randint(diffusion.T, (batch_size,), device=x0.device)
    noise = torch.randn_like(x0)
    x_t = diffusion.q_sample(x0, t, noise)
    with autocast:
        out = student(x_t, t, y)
    losses = diffusion.training_loss(out, x0, x_t, t, noise, lam)
    return mean_and_backward({'mse': losses['mse'], 'vb': losses['vb']}, scale)


@torch.no_grad()
def make_images(
    net, diffusion, n, shape, steps, draw_labels, guidance, chunk, autocast, progress=True
):
    """Data-Free Training: samples n images from the teacher. Returns (uint8 images (n, C, H, W),
    labels or None) on the CPU."""
    images, labels = [], []
    for i in tqdm(range(0, n, chunk), desc='making images', disable=not progress, leave=False):
        size = min(chunk, n - i)
        y = draw_labels(size)
        with autocast:
            x = M.sample(net, diffusion, (size, *shape), steps, 'ddpm', y, guidance, spacing='even')
        images.append(M.to_uint8(x).cpu())
        if y is not None:
            labels.append(y.cpu())
    return torch.cat(images), torch.cat(labels) if labels else None


# ==== the student ====
SIZES = {  # default sizes of the student; student_config overrides them
    'unet': dict(patch_size=2, model_channels=28, num_res_blocks=1, channel_mult=(1, 1),
                 attention_resolutions=(7,)),
    'dit': dict(patch_size=2, hidden_size=128, depth=6, num_heads=4)}


def build_denoiser(
    spec, image_size, in_channels, num_classes, learn_sigma=True, config={}, teacher=None
):
    """A denoiser with random weights: a name in models.DENOISERS with `config` as its sizes; a
    Python file, whose build(image_size, in_channels, num_classes, **config) is called; or the
    config.json of a diffusers network, which shares the teacher's embedded texts. Raises UserError
    if it does not fit the images or the condition."""
    size = dict(image_size=image_size, in_channels=in_channels, num_classes=num_classes)
    if spec in M.DENOISERS:
        takes = inspect.signature(M.DENOISERS[spec]).parameters.keys()
        sizes = takes - size.keys() - {'out_channels', 'learn_sigma'}
        if odd := config.keys() - sizes:
            raise M.UserError(
                f"student_config: {spec} has no {min(odd)!r}; it has {', '.join(sorted(sizes))}"
            )
        if 'out_channels' in takes:
            size['out_channels'] = in_channels * (2 if learn_sigma else 1)
        elif 'learn_sigma' in takes:
            size['learn_sigma'] = learn_sigma
        kw = SIZES.get(spec, {}) | config | size
        net = M.DENOISERS[spec](**kw)
        if 'class' not in getattr(net, 'config', {}):
            net.config = kw | {'class': type(net).__name__}
        return net
    if spec.endswith('.py'):
        net = M.build_from_file(spec, **config | size)
    elif spec.endswith('.json'):
        with open(spec) as f:
            said = json.load(f)
        said = {k: v for k, v in said.items() if not k.startswith('_')} | {
            'class': said['_class_name']
        }
        net = M.make(said | config)
        condition = getattr(teacher, 'condition', 'class' if num_classes else '')
        if net.condition != condition or condition == 'class' and net.num_classes != num_classes:
            raise M.UserError(
                f"{spec} takes {net.num_classes or ''} {net.condition or 'no condition'}, the "
                f"teacher {num_classes or ''} {condition or 'none'} (num_class_embeds counts the "
                'null class too)'
            )
        net.num_classes = num_classes
        net.shared = getattr(teacher, 'shared', net.shared)
    else:
        raise M.UserError(
            f"student={spec!r}: {', '.join(map(repr, M.DENOISERS))}, a Python file with build(), or the "
            'config.json of a network of diffusers'
        )
    for key, value in size.items():
        if getattr(net, key) != value:
            raise M.UserError(f'{spec}: its {key} is {getattr(net, key)}, it should be {value}')
    return net


def output_channels(net, device):
    """The number of channels that a user's or a diffusers network predicts. Raises UserError if it
    is neither C nor 2C."""
    C, H = net.in_channels, net.image_size
    t = torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad():
        out = net.eval()(torch.zeros(1, C, H, H, device=device), t, t if net.num_classes else None)
    if out.shape not in ((1, C, H, H), (1, 2 * C, H, H)):
        raise M.UserError(
            f'the student turns {(C, H, H)} into {tuple(out.shape[1:])}; it must return the same '
            'number of channels, or twice as many'
        )
    return out.shape[1]


@torch.no_grad()
def warn_if_y_is_ignored(net, name, diffusion, device, autocast):
    """Prints a warning if the network has classes, but gives the same output for two of them."""
    if net.num_classes < 2:
        return
    noise = torch.Generator(device).manual_seed(0)
    x_t = M.random_normal((1, net.in_channels, net.image_size, net.image_size), noise, device)
    t = torch.full((2,), diffusion.T // 2, device=device)
    y = torch.tensor([0, net.num_classes - 1], device=device)
    with autocast:
        first, last = net(x_t.expand(2, -1, -1, -1), t, y).float()
    if torch.allclose(first, last, rtol=1e-5, atol=1e-6):
        print(f'WARNING: {name} gives the same output for all {net.num_classes} classes; does its '
              'forward use y?')


# ==== set-up ====
if __name__ == '__main__':
    config = {k: globals()[k] for k in _defaults}
    walking = method in ('dynamic', 'shuffled', 'iterative')
    for wrong, message in [
        (
            method == 'data' and guidance not in (0, 1),
            "guidance: method='data' has no teacher to guide; set it in eval_fid.py",
        ),
        (
            method == 'data' and not data,
            "method='data' needs images: --data=mnist, an .npz or a folder",
        ),
        (
            real_fraction and (method != 'synthetic' or not data),
            "real_fraction mixes real images, --data=..., into those of method='synthetic'",
        ),
        (
            class_cond and method != 'data',
            "class_cond is for method='data'; other students have the classes of the teacher",
        ),
        ((refine or walk_evals) and method != 'jumps', "refine, walk_evals are for method='jumps'"),
        (
            walks_start < 1 and not walk_evals,
            'walks_start < 1 leaves a part of the pool empty that only walk_evals fills',
        ),
        (
            method == 'iterative' and grad_accum > 1,
            "method='iterative' moves all images at once: grad_accum must be 1",
        ),
        (
            rho <= 0 or stride < 1 or batch_size < 1 or walks < 1,
            'rho, stride, batch_size and walks must be above 0',
        ),
        (
            not 0 <= ema < 1 or not 0 <= uncond_prob <= 1 or not 0 <= real_fraction <= 1,
            'uncond_prob and real_fraction must be from 0 to 1, and ema from 0 to below 1',
        ),
    ]:
        if wrong:
            raise M.UserError(message)
    device, autocast, rank, world = M.init_distributed(device, dtype, seed)
    micro_batch = M.per_rank(batch_size, world, grad_accum)  # images of one forward pass
    if refine and micro_batch < jumps:  # some evaluations would never be trained
        raise M.UserError(
            'refine needs an image per jump in a forward pass, but batch_size / ranks / '
            f'grad_accum is {micro_batch}, and jumps is {jumps}'
        )
    compute_dtype = M.pick_dtype(device, dtype)
    if wandb:
        import wandb as wb

    # ---- teacher ----
    net_T = diffusion_T = None
    if method == 'data':
        images, labels = M.load_images(data)
        C, H = images.shape[1:3]
        num_classes = 0
        if class_cond:
            if labels is None:
                raise M.UserError(f'class_cond: {data} has no labels')
            num_classes = int(labels.max()) + 1
        else:
            labels = None
        process = dict(schedule=schedule, steps=T)
    else:
        net_T, diffusion_T = M.load_denoiser(teacher, compute_dtype, **teacher_config)
        config['teacher_digest'] = M.digest(net_T)
        net_T = M.cast_frozen(
            net_T.to(device, memory_format=M.memory_format(device)), compute_dtype
        )
        takes_text = getattr(net_T, 'condition', '') == 'text'
        if bool(prompts) != takes_text:
            raise M.UserError(
                f"{teacher} takes "
                f"{'texts: --prompts=file.txt' if takes_text else 'no texts (prompts)'}"
            )
        if takes_text:
            net_T.set_prompts(M.read_lines(prompts))
        C, H = net_T.in_channels, net_T.image_size
        T, process = diffusion_T.T, diffusion_T.config
        num_classes = net_T.num_classes
        if walking and (stride > T or warmup_steps > T):
            raise M.UserError(
                f'stride={stride}, warmup_steps={warmup_steps}: the teacher has T={T} steps'
            )
        guided_before = getattr(net_T, 'guided', False)  # the teacher is a guided student itself
        guidance = guidance or (2.0 if num_classes and not guided_before else 1.0)
        if guidance != 1 and guided_before:
            raise M.UserError(f'{teacher} already makes guided predictions: leave out guidance')
        if guidance != 1 and not num_classes:
            raise M.UserError(
                f'guidance={guidance} needs classes or texts, which {teacher} does not have'
            )
        if method == 'synthetic' and not diffusion_T.clip:
            raise M.UserError(
                "method='synthetic' stores pixels, this teacher makes latents: use method='dynamic'"
            )
    run_T = torch.compile(net_T, dynamic=False) if compile and net_T else net_T
    if net_T and rank == 0:
        warn_if_y_is_ignored(net_T, f'the teacher {teacher}', diffusion_T, device, autocast)
    ask_teacher = make_teacher(run_T, guidance, autocast)
    draw_labels = make_labels(num_classes, uncond_prob, device)

    # ---- student ----
    prediction = student_prediction
    if student_prediction == 'teacher':
        prediction = process.get('prediction', 'v')
    process = process | dict(prediction=prediction, learn_sigma=learn_sigma)
    if method == 'jumps':
        if prediction == 'eps':
            raise M.UserError(
                "method='jumps' starts from pure noise, where eps does not determine x_0: use "
                "student_prediction='x0'"
            )
        learn_sigma = False  # its sampler adds no noise
        # x_0* averages clamped x_0s of the teacher, so the student's needs no clamping
        process |= dict(learn_sigma=False, clip=False)
        sampler = 'ddim'
    net = build_denoiser(student, H, C, num_classes, learn_sigma, student_config, net_T).to(
        device, memory_format=M.memory_format(device)
    )
    diffusion = M.Diffusion(**process)
    M.match_times(net, diffusion)
    if student not in M.DENOISERS:
        process['learn_sigma'] = output_channels(net, device) == 2 * C
        diffusion = M.Diffusion(**process)
    sample_steps = sample_steps or (jumps if method == 'jumps' else 8)
    trained = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(
        trained, lr, (0.9, adamw['beta2']), weight_decay=adamw['weight_decay'], fused=True
    )
    checkpoint = M.resume(config, rank, net)
    net_ema = copy.deepcopy(net).eval().requires_grad_(False)
    model = torch.compile(net, dynamic=False) if compile else net
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    if eval_every:
        net_F, space, _ = M.load_features(eval_features, device)
        reference = M.read_statistics(eval_reference, space)
        colours = 3 if getattr(net_T, 'vae', None) else C
        if reference is None or net_F.in_channels != colours:
            raise M.UserError(
                f'eval_reference={eval_reference} and eval_features={eval_features} must be '
                f'statistics, and a classifier, of images with {colours} channels'
            )
    torch.manual_seed(seed * 1000 + rank + 1)  # from here on each rank draws its own random numbers
    begin = time.time()

    # ---- where (x_t, t, target) come from ----
    evaluations = 0
    if walking:
        batches = max(1, round(rho * T / stride)) if method == 'dynamic' else 1
        source = Pool(
            batches * batch_size // world, (C, H, H), diffusion_T, draw_labels,
            getattr(torch, pool_dtype), device
        )
    elif method == 'jumps':
        source = Walks(
            -(-walks // world), 1 if refine else jumps, walk_steps, (C, H, H), diffusion_T,
            micro_batch, draw_labels, getattr(torch, pool_dtype), device
        )
    elif method == 'synthetic':
        path = os.path.join(out_dir, f'synthetic_rank{rank}.npz')
        if not synthetic and not checkpoint:  # a resumed run finds them on disk
            n = -(-synthetic_images // world)
            draw = make_labels(num_classes, device=device)  # Images draws the null condition
            images, labels = make_images(
                run_T, diffusion_T, n, (C, H, H), synthetic_steps, draw, guidance, micro_batch,
                autocast, rank == 0
            )
            arrays = {'arr_0': images.permute(0, 2, 3, 1).numpy()}
            if labels is not None:
                arrays['arr_1'] = labels.numpy()
            M.write_atomically(path, lambda tmp: np.savez_compressed(tmp, **arrays))
        images, labels = M.load_npz(path) if not synthetic else M.load_images(synthetic, channels=C)
        if not synthetic:
            evaluations = len(images) * synthetic_steps
        if real_fraction:  # Data-Limited Training
            real, real_labels = M.load_images(data, channels=C)
            wanted = round(real_fraction * len(images))
            if wanted > len(real):
                raise M.UserError(
                    f'real_fraction={real_fraction} of {len(images)} images is {wanted}, but '
                    f'{data} has only {len(real)}'
                )
            g = torch.Generator().manual_seed(seed + rank)
            picked = torch.randperm(len(real), generator=g)[:wanted]
            kept = torch.randperm(len(images), generator=g)[wanted:]
            images = torch.cat([images[kept], real[picked]])
            if num_classes and labels is not None and real_labels is not None:
                labels = torch.cat([labels[kept], real_labels[picked]])
            else:
                labels = None
    if method in ('data', 'synthetic'):
        if images.shape[1:] != (C, H, H):
            raise M.UserError(f'the images are {tuple(images.shape[1:])}, they must be {(C, H, H)}')
        if num_classes and (labels is None or labels.max() >= num_classes):
            raise M.UserError(
                f"the images need labels 0 ... {num_classes - 1} ('arr_1', or a subfolder per "
                "class)"
            )
        labels = labels.to(device) if num_classes else None
        source = Images(images.to(device), labels, uncond_prob, flip)
    if rank == 0:
        for role, name, n, d in (
            ('student', student, net, diffusion),
            ('teacher', teacher, net_T, diffusion_T),
        ):
            if n is not None:
                size = sum(p.numel() for p in n.parameters())
                print(f'{role} {name}: {size / 1e6:.2f} M parameters, predicts {d.prediction}')
        how = f', guidance {guidance:g}' if guidance not in (0, 1) else ''
        if walking:
            n = len(source.x) * world
            how += f'; a pool of {n:,} images, {source.x.nbytes * world / 2 ** 20:.1f} MB'
        print(
            f'{method}, {max_steps:,} steps of {batch_size} images of {C}x{H}x{H} on {world} x '
            f'{device.type}{how}'
        )

    # ---- results on disk ----
    pipeline = getattr(net_T, 'source', '')  # the teacher's, if it has one
    about = {'guided': net_T is not None and (guided_before or guidance != 1)}
    if getattr(net_T, 'vae', None):
        about['vae'] = pipeline
    if isinstance(net, M.Pipeline):
        about['pipeline'] = pipeline
    if method == 'jumps':
        about['sampling'] = dict(sampler='ddim', steps=jumps, spacing='trailing')
    last_pictures = time.time()

    def pictures(seconds_per_evaluation):
        """Writes samples.png: rows of the teacher's images above the student's, of the same noise.
        There are fewer than 36 if 36 would take more than a tenth of the training time since the
        last call, and more than 20 s; a signal ends it."""
        global last_pictures
        steps_T = walk_steps if method == 'jumps' else sample_steps
        passes = sample_steps
        if net_T is not None:
            passes += steps_T * (2 if guidance != 1 else 1)
        budget = max(20.0, 0.1 * (time.time() - last_pictures))
        n = int(min(36, budget / max(1e-9, passes * seconds_per_evaluation)))
        n = n if n < 12 else n // 12 * 12
        if not n:
            print('no samples.png: even one picture would take more than a tenth of the training')
            return
        y = torch.arange(n, device=device) % 12 % num_classes if num_classes else None
        rows = [(net_ema, diffusion, 1.0, sample_steps)]
        if net_T is not None:
            rows.insert(0, (net_T, diffusion_T, guidance, steps_T))
        sets = []
        for network, process, scale, steps in rows:
            noise = torch.Generator(device).manual_seed(seed)  # the same at every step for both
            x = M.random_normal((n, C, H, H), noise, device)
            at_once = n if x.numel() < 2**18 else 1  # large images: one by one, with a progress bar
            images = []
            for k in tqdm(range(0, n, at_once), 'pictures', leave=False, disable=at_once == n):
                part = slice(k, k + at_once)
                label = None if y is None else y[part]
                with autocast, torch.no_grad():
                    z = M.sample(network, process, x[part], steps, sampler, label, scale, noise)
                    images.append(M.decode(net_T, z))
            sets.append(torch.cat(images))
        M.save_grid(os.path.join(out_dir, 'samples.png'), sets, 12)
        last_pictures = time.time()

    @torch.no_grad()
    def distance():
        """The Frechet distance of 1,000 images of the student (its EMA), always from the same
        noise, to eval_reference."""
        noise = torch.Generator(device).manual_seed(seed)
        found = []
        for _ in range(10):
            y = (
                torch.randint(num_classes, (100,), generator=noise, device=device)
                if num_classes
                else None
            )
            with autocast:
                x = M.sample(
                    net_ema, diffusion, (100, C, H, H), sample_steps, sampler, y, 1.0, noise
                )
                x = M.decode(net_T, x)
            found.append(M.features(net_F, M.to_uint8(x))[0].cpu().double())
        f = torch.cat(found)
        return M.frechet_distance(f.mean(0), f.T.cov(), reference['mu'], reference['sigma'])[0]

    def save_checkpoint():
        shared = {'ema': net_ema.state_dict(), 'evaluations': evaluations, 'best': best}
        own = {
            'pool': source.state() if method != 'data' and method != 'synthetic' else {},
            'sums': sums,
        }
        M.save_checkpoint(config, step, net, opt, shared, own, rank)

    # ==== the loop ====
    step, best = 0, math.inf
    sums = {}  # tensors on the device: no wait for the GPU between rows
    if checkpoint:
        shared, own = M.restore(checkpoint, opt)
        step, evaluations, best = shared['step'], shared['evaluations'], shared['best']
        sums = {k: v.to(device) for k, v in own['sums'].items()}
        net_ema.load_state_dict(shared['ema'])
        if own['pool']:
            source.load(own['pool'])
    elif method == 'jumps':
        evaluations = source.fill(ask_teacher, walks_start, rank == 0)
    elif walking:
        evaluations = source.fill(
            ask_teacher, warmup_steps or max(1, T // stride), micro_batch, method == 'iterative',
            rank == 0
        )
    if not checkpoint and method != 'data':
        save_checkpoint()  # so that the walks or the synthetic images are not lost
    if rank == 0:
        log = M.Log(os.path.join(out_dir, 'log.csv'), step)
        if wandb:
            wb.init(project=wandb, name=os.path.basename(out_dir), config=config)
        if method != 'data':
            print(f'{evaluations * world:,} teacher evaluations before the first step')
    stop = M.StopFlag()  # a signal while the pool is filled ends the run at once
    net.train()
    first, leaving = step, 0
    start = time.time()  # of the loop; `seconds` in log.csv includes filling the pool
    paused = 0.0  # seconds spent on pictures and distances
    bar = tqdm(total=max_steps, initial=step, disable=rank > 0, mininterval=1)
    while step < max_steps:
        scale = min(1.0, (step + 1) / max(1, lr_warmup))
        if lr_decay:
            scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
        opt.param_groups[0]['lr'] = lr * scale
        for i in range(grad_accum):
            if world > 1:
                model.require_backward_grad_sync = i == grad_accum - 1
            if refine:
                terms = refine_step(
                    model, net_ema, source, diffusion, micro_batch, jumps, jump_loss, autocast,
                    1 / grad_accum
                )
            elif method == 'jumps':
                terms = jump_step(
                    model, source, diffusion, micro_batch, jump_loss, autocast, 1 / grad_accum
                )
            elif walking:
                jump = None
                if method == 'iterative':  # all images share one t, on all ranks
                    jump = random.Random(step).randint((stride + 1) // 2, stride + stride // 2)
                terms = distill_step(
                    model, ask_teacher, source, diffusion, micro_batch, stride, lam, jump, autocast,
                    1 / grad_accum
                )
            else:
                terms = training_step(
                    model, source, diffusion, micro_batch, lam, autocast, 1 / grad_accum
                )
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / grad_accum
        norm = optimizer_step(net, net_ema, opt, grad_clip, ema, step)
        if method == 'jumps':
            for _ in range(walk_evals):
                source.advance(ask_teacher)
        sums['grad_norm'] = sums.get('grad_norm', 0.0) + norm
        sums['steps'] = sums.get('steps', 0.0) + torch.ones_like(norm)
        step += 1
        bar.update()
        if world == 1 or step % 5 == 0:
            leaving = M.all_reduce_max(stop.signal)
        saving = step % save_every == 0 or step == max_steps or leaving
        evaluating = eval_every and (step % eval_every == 0 or step == max_steps)
        logging = step % log_every == 0 or step == max_steps or evaluating
        if logging or saving:
            means = dict(zip(sums, torch.stack(list(sums.values())).tolist()))  # the one wait
            n = means.pop('steps')
            means = {k: v / n for k, v in means.items()}
            if not math.isfinite(means['grad_norm']):  # the same on all ranks, as gradients are
                bar.close()
                sums = {}
                save_checkpoint()  # what was learned before and after that step
                raise M.UserError(
                    f'step {step}: the gradient was not finite in a step since the last row; that '
                    'step changed no weights, and --init_from=resume goes on after it. If it '
                    f'happens again, try a smaller --lr (now {lr * scale:.2g})'
                )
        if logging:
            if rank == 0:
                norm = means.pop('grad_norm')
                row = dict(
                    step=step, loss=sum(means.values()), **means, grad_norm=norm, lr=lr * scale
                )
                bar.set_postfix(loss=f"{row['loss']:.4f}")
                if eval_every:
                    before = time.time()
                    row['frechet'] = distance() if evaluating else ''
                    if evaluating and row['frechet'] < best:
                        best = row['frechet']
                        M.save_model(
                            net_ema, os.path.join(out_dir, 'best.safetensors'), diffusion, **about
                        )
                    paused += time.time() - before
                seconds = time.time() - start - paused
                row['images_per_s'] = (step - first) * batch_size / seconds
                row['seconds'] = log.seconds + start - begin + seconds
                log(**row)
                if wandb:
                    wb.log({k: v for k, v in row.items() if v != ''}, step=step)
            sums = {}
        if saving:
            save_checkpoint()  # first: after SIGTERM there may be little time
            if rank == 0:
                before = time.time()
                M.save_model(
                    net_ema, os.path.join(out_dir, 'student.safetensors'), diffusion, **about
                )
                per_evaluation = (
                    (before - start - paused) / (step - first) / micro_batch / grad_accum
                )
                if not leaving:
                    with stop.interrupts():
                        pictures(per_evaluation)
                paused += time.time() - before
        if leaving:
            break
    bar.close()
    if rank == 0:
        warn_if_y_is_ignored(net_ema, 'the student', diffusion, device, autocast)
        if step == first:  # killed after the last checkpoint, before the result was saved
            M.save_model(net_ema, os.path.join(out_dir, 'student.safetensors'), diffusion, **about)
        path = os.path.join(out_dir, 'student.safetensors')
        if student.endswith('.py'):
            path = f'{student}:{path}'
        command = ['eval_fid.py', f'--models={path}' + (f',{teacher}' if net_T else '')]
        if teacher_config:
            command.append(f'--model_config={teacher_config}')
        if net_T and guidance != 1:
            command.append(f'--guidance={guidance}')
        if prompts:
            command.append(f'--prompts={prompts}')
        if method != 'jumps' and (sampler, sample_steps) != ('ddim', 8):
            command += [f'--sampler={sampler}', f'--steps={sample_steps}']
        colours = 3 if getattr(net_T, 'vae', None) else C
        if eval_features != _defaults['eval_features']:
            command += [f'--features={eval_features}', f'--reference={eval_reference}']
        elif colours == 3:
            command += [
                '--features=pretrained/cifar10_resnet.safetensors',
                '--reference=pretrained/cifar10_stats.npz',
            ]
        print(
            f'step {step} of {max_steps}, {time.time() - begin + log.seconds:.0f} s; student: {path}'
        )
        print('evaluate: python ' + shlex.join(command))
        if isinstance(net, M.Pipeline):
            print(
                'for diffusers: python '
                + shlex.join(['export.py', f'--model={path}', f'--out_dir={out_dir}/pipeline'])
            )
        if wandb:
            wb.finish()
    M.finish(leaving)
