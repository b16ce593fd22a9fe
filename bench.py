"""
How fast one training step of dkdm.py is, and how far that is from what the machine can do: teacher, student forward and
backward, optimiser with EMA, and the walk, on random images and with random weights.

    python bench.py                                                    # a CIFAR-10 U-Net of 11 M teaches one of 2.8 M
    python bench.py config/dkdm_cifar10.py --compile=True              # the settings of an experiment
    torchrun --nproc_per_node=8 bench.py config/dkdm_cifar10.py        # the same, the figures of each rank
    python bench.py --what=sample                                      # ms per image of each sampler

All settings of dkdm.py are settings here too. The teacher is random, of the student's architecture but for its width.
The peak is measured in the same run and dtype, before and after: the best of a large matrix product and a 3x3
convolution. An operation is a multiplication or an addition, in matrix products, convolutions and attention.
"""
import os

_settings = {}
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'dkdm.py'), encoding='utf-8') as _f:
    exec(_f.read().split('exec(open(')[0], _settings)                          # dkdm.py's settings as they stand there
globals().update({k: v for k, v in _settings.items() if not k.startswith('_')})
# what is timed
what = 'step'                # 'step', or 'sample'
repeats = 10                 # steps or batches that are timed, after two that are not
# networks, the default's
image_size = 32
channels = 3                 # of the images
classes = 0                  # of teacher and student; above 0 the teacher is guided
model_channels = 32          # of the student (unet)
teacher_width = 0            # model_channels (unet) or hidden_size (dit) of the teacher; 0 is twice the student's
num_res_blocks = 2
channel_mult = (1, 2, 2, 2)
attention_resolutions = (16, 8)
patch_size = 1
stride = 1
_ranges = _settings['_ranges'] | {'what': ('step', 'sample'), 'student': ('unet', 'dit')}
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import copy

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models as M

device, autocast, rank, world = M.start(device, dtype, seed)
B = M.share(batch_size, world, grad_accum)                                     # images of one forward pass
dtype = M.pick_dtype(device, dtype)
dtype = torch.float32 if dtype == torch.float16 else dtype                     # which is for frozen pipelines alone


# ---- networks ----
said, name = {k: globals()[k] for k in _defaults}, 'hidden_size' if student == 'dit' else 'model_channels'
try:
    net_T, net = (M.make_student(said | {name: width}, channels, image_size, classes).to(
        device, memory_format=M.memory_format(device)) for width in (teacher_width or 2 * said[name], said[name]))
    pool = max(1, round(rho * T / stride)) * B * grad_accum
    if 4 * pool * channels * image_size ** 2 > M.free_memory(device):
        raise ValueError(f'a pool of {pool:,} images does not fit into memory: a smaller --rho or --batch_size')
except ValueError as e:
    M.die(e)
net_T = M.cast_frozen(net_T.eval().requires_grad_(False), dtype)
net_ema = copy.deepcopy(net).eval().requires_grad_(False)
diffusion_T = M.Diffusion()
diffusion = M.Diffusion(prediction='eps' if student_prediction == 'teacher' else student_prediction)
opt = torch.optim.AdamW(net.parameters(), lr, (0.9, beta2), weight_decay=weight_decay, fused=True)
run_T, model = (torch.compile(n, dynamic=False) if compile else n for n in (net_T, net))
if world > 1:
    model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
scale = (guidance or 2.) if classes else 1.
pool_x = torch.randn(pool, channels, image_size, image_size, device=device)
pool_t = torch.randint(T, (len(pool_x),), device=device)
pool_y = torch.randint(classes, (len(pool_x),), device=device) if classes else None


def step(done):
    """One step of dkdm.py; `done(name)` is called after each of its parts."""
    order = torch.randperm(len(pool_x), device=device)
    for i in range(grad_accum):
        idx = order[i * B:(i + 1) * B]
        x_t, t, y = pool_x[idx], pool_t[idx], pool_y[idx] if classes else None
        with torch.no_grad(), autocast:
            out_T = M.guided(run_T, x_t, t, y, scale).float()
        done('teacher')
        with autocast:
            out = model(x_t, t, y)
        done('student forward')
        target = diffusion_T.convert(out_T, x_t, t, diffusion.prediction)
        (diffusion.distill_loss(out, target, x_t, t, lam)['loss'].mean() / grad_accum).backward()
        done('losses and backward')
        s = (t - torch.randint((stride + 1) // 2, stride + stride // 2 + 1, t.shape, device=device)).clamp(min=-1)
        x_s = diffusion_T.ddpm_step(out_T, x_t, t, s)
        pool_x[idx] = torch.where((s < 0).view(-1, 1, 1, 1), torch.randn_like(x_s), x_s)
        pool_t[idx] = torch.where(s < 0, T - 1, s)
        done('walk')
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or float('inf'))
    opt.found_inf = (~norm.isfinite()).float()
    opt.step()
    opt.zero_grad(set_to_none=True)
    M.update_ema(net_ema, net, ema, 1)
    done('optimiser, EMA')


# ---- measuring ----
def now():
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(f):
    """The median time of a call, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        t0 = now()
        f()
        times.append(now() - t0)
    return sorted(times[2:])[repeats // 2]


def gigaflop(f):
    """Of one call, in 10^9 operations. Attention is counted as its matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def peak():
    """The machine's GFLOP/s in `dtype`: the better of a matrix product and a convolution."""
    n, c = (8192, 512) if device.type == 'cuda' else (2048, 128)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    x = torch.randn(64, c, 32, 32, device=device, dtype=dtype).to(memory_format=M.memory_format(device))
    w = torch.randn(c, c, 3, 3, device=device, dtype=dtype).to(memory_format=M.memory_format(device))
    return max(gigaflop(f) / seconds(f) for f in (lambda: a @ b, lambda: F.conv2d(x, w, padding=1)))


def run_networks():
    """The two networks alone, without compiling, for counting."""
    x, t, y = pool_x[:B], pool_t[:B], pool_y[:B] if classes else None
    with torch.no_grad(), autocast:
        M.guided(net_T, x, t, y, scale)
    with autocast:
        out = net(x, t, y)
    out.float().mean().backward()
    opt.zero_grad(set_to_none=True)


top = peak()
if what == 'step':
    work, whole = grad_accum * gigaflop(run_networks), seconds(lambda: step(lambda name: None))
    parts, last = {}, [0.]

    def done(name):
        parts.setdefault(name, []).append(now() - last[0])
        last[0] = now()
    for _ in range(repeats + 2):
        last[0] = now()
        step(done)
    ms = {k: 1000 * grad_accum ** (k != 'optimiser, EMA') * sorted(v)[len(v) // 2] for k, v in parts.items()}
    networks = sum(v for k, v in ms.items() if k not in ('walk', 'optimiser, EMA')) / 1000
    top = max(top, peak())
    lines = [f'one step: {whole:.4g} s, {B * grad_accum / whole:,.1f} images/s; {work:,.0f} GFLOP, {work / whole:,.0f} '
             f'GFLOP/s, {100 * work / whole / top:.0f} % of the peak',
             'parts, ms: ' + ', '.join(f'{k} {v:.1f}' for k, v in ms.items()),
             f'the networks and the loss alone: {networks:.4g} s, {100 * work / networks / top:.0f} % of the peak']
else:
    lines, counts, shape = [], (1, 2, 4, 8, 16, 50), (B, channels, image_size, image_size)
    y = None if pool_y is None else pool_y[:B]
    for name, n, g in (('teacher', net_T, scale), ('student', net_ema, 1.)):
        for sampler in ('ddpm', 'ddim', 'dpm++'):
            with autocast:
                ms = [1000 * seconds(lambda: M.sample(n, diffusion, shape, k, sampler, y, g)) / B for k in counts]
            lines.append(f'{name} {sampler:6} ms per image: ' + ', '.join(f'{v:.3g} ({k})' for v, k in zip(ms, counts)))
    lines.append('in brackets: evaluations of an image' + ', each two passes of the guided teacher' * (scale > 1))
if device.type == 'cuda':
    lines.append(f'peak memory: {torch.cuda.max_memory_allocated() / 2 ** 20:,.0f} MB')
millions = [f'{sum(p.numel() for p in n.parameters()) / 1e6:.2f} M' for n in (net_T, net)]
print(f'rank {rank} of {world}, {device.type}, {str(dtype)[6:]}: teacher {millions[0]}, student {millions[1]} '
      f'parameters; {B} images of {channels}x{image_size}x{image_size}, {torch.get_num_threads()} threads; '
      f'peak {top:,.0f} GFLOP/s', *lines, sep='\n')
M.leave()
