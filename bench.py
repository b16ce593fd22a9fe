"""
Times one training step of dkdm.py and compares it with the machine's peak: teacher, student forward
and backward, optimiser with EMA, and the walk, on random images and with random weights.

    python bench.py  # a CIFAR-10 U-Net of 11 M teaches one of 2.8 M
    python bench.py config/dkdm_cifar10.py --compile=True  # the settings of an experiment
    # the same, the figures of each rank
    torchrun --nproc_per_node=8 bench.py config/dkdm_cifar10.py
    python bench.py --what=sample  # ms per image of each sampler

All settings of dkdm.py are settings here too. The teacher has random weights and the student's
architecture, but another width. The peak is measured in the same run and dtype, before and after:
it is the faster of a large matrix product and a 3x3 convolution. FLOPs count the multiplications
and additions in matrix products, convolutions and attention.
"""
import os

import dkdm
from dkdm import *           # all settings of dkdm.py are settings here too

# what is timed
what = 'step'                # 'step', or 'sample'
repeats = 10                 # steps or batches to time, after two for warm-up
# networks
image_size = 32
channels = 3                 # of the images
classes = 0                  # of teacher and student; the teacher is guided if above 0
student_config = {'patch_size': 1, 'model_channels': 32, 'num_res_blocks': 2,
                  'channel_mult': (1, 2, 2, 2), 'attention_resolutions': (16, 8)}
teacher_width = 0            # model_channels or hidden_size of the teacher; 0 is twice the
                             # student's
stride = 1
_ranges = dkdm._ranges | {'what': ('step', 'sample'), 'student': ('unet', 'dit')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import copy
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models as M


# ==== measuring ====
def now(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(f, device, repeats=10):
    """The median time of a call, after two calls for warm-up."""
    times = []
    for _ in range(repeats + 2):
        begin = now(device)
        f()
        times.append(now(device) - begin)
    return median(times[2:])


def gigaflop(f):
    """GFLOP of one call of f. Attention counts as its matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def peak(device, dtype, repeats=10):
    """The machine's GFLOP/s in `dtype`: the better of a matrix product and a 3x3 convolution."""
    n, c = (8192, 512) if device.type == 'cuda' else (2048, 128)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    layout = M.memory_format(device)
    x = torch.randn(64, c, 32, 32, device=device, dtype=dtype).to(memory_format=layout)
    w = torch.randn(c, c, 3, 3, device=device, dtype=dtype).to(memory_format=layout)

    def product():
        return a @ b

    def convolution():
        return F.conv2d(x, w, padding=1)

    return max(gigaflop(f) / seconds(f, device, repeats) for f in (product, convolution))


class Timed:
    """A callable whose calls are timed: `times`, a list of seconds."""

    def __init__(self, f, device):
        self.f = f
        self.device = device
        self.times = []

    def __call__(self, *args, **kw):
        begin = now(self.device)
        result = self.f(*args, **kw)
        self.times.append(now(self.device) - begin)
        return result


# ==== the step of dkdm.py ====
if __name__ == '__main__':
    device, autocast, rank, world = M.init_distributed(device, dtype, seed)
    B = M.per_rank(batch_size, world, grad_accum)  # images of one forward pass
    dtype = M.pick_dtype(device, dtype)
    if dtype == torch.float16:  # float16 is only for frozen pipelines
        dtype = torch.float32
    layout = M.memory_format(device)
    sizes = SIZES[student] | student_config
    width = 'hidden_size' if student == 'dit' else 'model_channels'
    wider = sizes | {width: teacher_width or 2 * sizes[width]}
    net_T = build_denoiser(student, image_size, channels, classes, config=wider)
    net = build_denoiser(student, image_size, channels, classes, config=sizes)
    net_T = M.cast_frozen(
        net_T.to(device, memory_format=layout).eval().requires_grad_(False), dtype
    )
    net = net.to(device, memory_format=layout)
    net_ema = copy.deepcopy(net).eval().requires_grad_(False)
    diffusion_T = M.Diffusion()
    diffusion = M.Diffusion(
        prediction='eps' if student_prediction == 'teacher' else student_prediction
    )
    opt = torch.optim.AdamW(
        net.parameters(), lr, (0.9, adamw['beta2']), weight_decay=adamw['weight_decay'], fused=True
    )
    run_T, model = net_T, net
    if compile:
        run_T = torch.compile(net_T, dynamic=False)
        model = torch.compile(net, dynamic=False)
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    scale = (guidance or 2.0) if classes else 1.0
    pool = Pool(
        max(1, round(rho * T / stride)) * B, (channels, image_size, image_size), diffusion_T,
        make_labels(classes, 0.0, device), getattr(torch, pool_dtype), device
    )
    pool.t = torch.randint(T, pool.t.shape, device=device)
    teacher = Timed(make_teacher(run_T, scale, autocast), device)
    pool.draw = Timed(pool.draw, device)
    pool.advance = Timed(pool.advance, device)
    forward = Timed(model, device)
    step = Timed(distill_step, device)
    update = Timed(optimizer_step, device)

    def one_step():
        for _ in range(grad_accum):
            step(forward, teacher, pool, diffusion, B, stride, lam, None, autocast, 1 / grad_accum)
        update(net, net_ema, opt, grad_clip, ema, 1)

    def networks():
        """The two networks alone, not compiled, for counting FLOPs."""
        _, x_t, t, y = pool.draw(B)
        make_teacher(net_T, scale, autocast)(x_t, t, y)
        with autocast:
            out = net(x_t, t, y)
        out.float().mean().backward()
        opt.zero_grad(set_to_none=True)

    top = peak(device, dtype, repeats)
    if what == 'step':
        work = grad_accum * gigaflop(networks)
        whole = seconds(one_step, device, repeats)
        timed = dict(teacher=teacher, student=forward, pool=pool.advance, optimiser=update)
        ms = {name: 1000 * median(part.times[2:]) for name, part in timed.items()}
        rest = 1000 * median(step.times[2:]) - ms['teacher'] - ms['student'] - ms['pool']
        top = max(top, peak(device, dtype, repeats))
        lines = [
            f'one step: {whole:.4g} s, {B * grad_accum / whole:,.1f} images/s; {work:,.0f} GFLOP, '
            f'{work / whole:,.0f} GFLOP/s, {100 * work / whole / top:.0f} % of the peak',
            f'ms of {grad_accum} x (teacher {ms["teacher"]:.1f}, student forward '
            f'{ms["student"]:.1f}, losses, backward and walk {rest:.1f}, pool {ms["pool"]:.1f}), '
            f'optimiser and EMA {ms["optimiser"]:.1f}',
        ]
    else:
        lines = []
        counts = (1, 2, 4, 8, 16, 50)
        y = None if pool.y is None else pool.y[:B]
        shape = B, channels, image_size, image_size
        for name, network, g in (('teacher', net_T, scale), ('student', net_ema, 1.0)):
            for sampler in ('ddpm', 'ddim', 'dpm++'):
                cells = []
                for k in counts:
                    with autocast:
                        once = seconds(
                            lambda: M.sample(network, diffusion, shape, k, sampler, y, g), device,
                            repeats
                        )
                    cells.append(f'{1000 * once / B:.3g} ({k})')
                lines.append(f'{name} {sampler:6} ms per image: ' + ', '.join(cells))
        lines.append(
            'in brackets: evaluations per image'
            + ('; one of the guided teacher is two passes' if scale > 1 else '')
        )
    if device.type == 'cuda':
        lines.append(f'peak memory: {torch.cuda.max_memory_allocated() / 2 ** 20:,.0f} MB')
    millions = [f'{sum(p.numel() for p in n.parameters()) / 1e6:.2f} M' for n in (net_T, net)]
    print(
        f'rank {rank} of {world}, {device.type}, {str(dtype)[6:]}: teacher {millions[0]}, student '
        f'{millions[1]} parameters; {B} images of {channels}x{image_size}x{image_size}, '
        f'{torch.get_num_threads()} threads; peak {top:,.0f} GFLOP/s',
        *lines,
        sep='\n',
    )
    M.finish()
