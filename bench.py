"""
Times one training step of dkdm.py and compares it with the machine's peak, on random images and
with random weights. On one GPU: as it is, as a CUDA graph, with compiled blocks, and both, for the
batch of the config and for four times as many images.

    python bench.py  # a CIFAR-10 U-Net of 11 M teaches one of 2.8 M
    python bench.py config/dkdm_cifar10.py --teacher_width=128  # the settings of an experiment
    # the same, the figures of each rank
    torchrun --nproc_per_node=8 bench.py config/dkdm_cifar10.py
    python bench.py --what=sample  # ms per image of each sampler

All settings of dkdm.py are settings here too (`python dkdm.py --help`); those of data and output
have no effect, and `variants` replaces `compile` and `graph`. Images are of image_size and channels
below, whatever the config. The teacher has random weights and the student's architecture, but
another width. The peak is measured in the same run and dtype, before and after: it is the faster of
a large matrix product and a 3x3 convolution. FLOPs count the multiplications and additions in
matrix products, convolutions and attention.
"""
import os

import dkdm
from dkdm import *           # all settings of dkdm.py are settings here too

# what is timed
what = 'step'                # 'step', or 'sample' (with graph=True as a CUDA graph)
variants = ''                # of the step: some of 'eager,graph,compiled,both'; '' is all on one
                             # GPU, 'eager' elsewhere
multiples = ''               # of batch_size; '' is '1,4' on one GPU, else '1'
layout = 'auto'              # of the networks: 'auto' (models.memory_format), 'channels_last',
                             # 'contiguous_format'
repeats = 10                 # steps or batches to time, after those for warm-up
# networks
image_size = 32
channels = 3                 # of the images
classes = 0                  # of teacher and student; the teacher is guided if above 0
student_config = {'patch_size': 1, 'model_channels': 32, 'num_res_blocks': 2,
                  'channel_mult': (1, 2, 2, 2), 'attention_resolutions': (16, 8)}
teacher_width = 0            # model_channels or hidden_size of the teacher; 0 is twice the
                             # student's
stride = 1
_ranges = dkdm._ranges | {
    'what': ('step', 'sample'), 'student': ('unet', 'dit'),
    'layout': ('auto', 'channels_last', 'contiguous_format')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import copy
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import models as M

students = M.adapter('students')


# ==== measuring ====
def now(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(f, device, repeats=10, warmup=2):
    """The median time of a call. On a GPU it is that of a row of calls with one wait at the end, as
    in a training loop."""
    for _ in range(warmup):
        f()
    times = []
    for _ in range(3 if device.type == 'cuda' else repeats):
        calls = repeats if device.type == 'cuda' else 1
        begin = now(device)
        for _ in range(calls):
            f()
        times.append((now(device) - begin) / calls)
    return median(times)


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


def busiest(f, n=6, calls=3):
    """Lines about the n kernels that take most of the GPU's time in a call of f."""
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(calls):
            f()
        torch.cuda.synchronize()
    events = sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / calls / 1000
    count = sum(e.count for e in events) // calls
    lines = [f'    {total:.1f} ms on the GPU, {count} kernels']
    for e in events[:n]:
        ms = e.self_device_time_total / calls / 1000
        lines.append(f'    {ms:8.2f} ms {e.count // calls:5d} x {e.key[:70]}')
    return lines


# ==== the step of dkdm.py ====
class Step:
    """Teacher, student, pool and optimiser with random weights, for batches of B images."""

    def __init__(self, B):
        sizes = students.SIZES[student] | student_config
        width = 'hidden_size' if student == 'dit' else 'model_channels'
        wider = sizes | {width: teacher_width or 2 * sizes[width]}
        form = getattr(torch, layout, M.memory_format(device))
        size = image_size, channels, classes
        torch.manual_seed(seed)
        net_T, net = [
            students.build_denoiser(student, *size, config=c).to(device, memory_format=form)
            for c in (wider, sizes)
        ]
        self.net_T = M.cast_frozen(net_T.eval().requires_grad_(False), compute_dtype)
        self.net = net
        self.net_ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        prediction = 'eps' if student_prediction == 'teacher' else student_prediction
        self.diffusion = M.Diffusion(prediction=prediction)
        self.opt = torch.optim.AdamW(self.net.parameters(), lr, fused=True)
        self.model = self.net
        if world > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(
                self.net, gradient_as_bucket_view=True
            )
        T = self.diffusion.T
        self.guidance = (guidance or 2.0) if classes else 1.0
        self.teacher = M.make_teacher(self.net_T, self.guidance, autocast)
        self.B = B
        self.pool = Pool(
            max(1, round(rho * T / stride)) * B, (channels, image_size, image_size),
            M.Diffusion(), M.make_labels(classes, 0.0, device), device
        )
        self.pool.t = torch.randint(T, self.pool.t.shape, device=device)

    def variant(self, graphed):
        """The step as a function; `graphed`: as a CUDA graph."""
        decay = torch.full((), ema, device=device) if graphed else ema

        def step():
            for _ in range(grad_accum):
                terms = distill_step(
                    self.model, self.teacher, self.pool, self.diffusion, self.B, stride, lam, None,
                    autocast, 1 / grad_accum
                )
            terms['grad_norm'] = M.optimizer_step(self.net, self.opt, grad_clip)
            M.update_ema(self.net_ema, self.net, decay)
            return terms

        run = M.Graphed(step, device, graphed, self.opt)
        M.set_learning_rate(self.opt, lr)
        return run

    def ask_teacher(self):
        _, x_t, t, y = self.pool.draw(self.B)
        self.teacher(x_t, t, y)

    def ask_student(self):
        _, x_t, t, y = self.pool.draw(self.B)
        with autocast:
            out = self.model(x_t, t, y)
        out.float().mean().backward()
        self.opt.zero_grad(set_to_none=True)


def step_lines(B, top, names):
    """Lines about what a step costs with batches of B images, for each of the variants."""
    s = Step(B)
    on_gpu = device.type == 'cuda'
    work = grad_accum * (gigaflop(s.ask_teacher) + gigaflop(s.ask_student))
    for name in names:
        begin = now(device)
        if name in ('compiled', 'both'):  # a second time it changes nothing
            M.compile_blocks(s.net_T, s.net)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = s.variant(name in ('graph', 'both'))
        for _ in range(5 if on_gpu else 2):
            step()
        ready = now(device) - begin
        once = seconds(step, device, repeats, 0)
        line = (
            f'{name}, {B * grad_accum} images: one step {once:.4g} s, '
            f'{B * grad_accum / once:,.1f} images/s; {work:,.0f} GFLOP, {work / once:,.0f} '
            f'GFLOP/s, {100 * work / once / top:.0f} % of the peak; ready after {ready:.0f} s'
        )
        if on_gpu:
            line += f'; {torch.cuda.max_memory_reserved() / 2**20:,.0f} MB'
        yield line
        if name == 'eager':
            ms_T, ms_S = [
                1000 * seconds(f, device, repeats, 1) for f in (s.ask_teacher, s.ask_student)
            ]
            yield f'    ms: teacher {ms_T:.1f}, student forward and backward {ms_S:.1f}'
        if on_gpu:
            yield from busiest(step)


def sample_lines(B):
    """Lines with the ms per image of every sampler, for several numbers of evaluations."""
    s = Step(B)
    shape = B, channels, image_size, image_size
    y = None if s.pool.y is None else s.pool.y[:B]
    for name, net, g in (('teacher', s.net_T, s.guidance), ('student', s.net_ema, 1.0)):
        if graph:
            M.graph_network(net, device)
        for sampler in ('ddpm', 'ddim', 'dpm++'):
            cells = []
            for k in (1, 2, 4, 8, 16, 50):
                with autocast:
                    once = seconds(
                        lambda: M.sample(net, s.diffusion, shape, k, sampler, y, g), device, repeats
                    )
                cells.append(f'{1000 * once / B:.3g} ({k})')
            yield f'{name} {sampler:6} ms per image: ' + ', '.join(cells)
    yield 'in brackets: evaluations per image; a guided one is two passes'


if __name__ == '__main__':
    device, autocast, rank, world = M.init_distributed(device, dtype, seed)
    micro_batch = M.per_rank(batch_size, world, grad_accum)  # images of one forward pass
    compute_dtype = M.pick_dtype(device, dtype)
    if compute_dtype == torch.float16:  # float16 is only for frozen pipelines
        compute_dtype = torch.float32
    one_gpu = device.type == 'cuda' and world == 1
    names = (variants or ('eager,graph,compiled,both' if one_gpu else 'eager')).split(',')
    odd = set(names) - {'eager', 'graph', 'compiled', 'both'}
    M.check(not odd, f"variants={variants!r}: some of 'eager,graph,compiled,both'")
    top = peak(device, compute_dtype, repeats)
    mark = f'rank {rank}: ' if world > 1 else ''
    print(
        f'rank {rank} of {world}, {device.type}, {str(compute_dtype)[6:]}, layout {layout}, '
        f'{torch.get_num_threads()} threads; {channels}x{image_size}x{image_size}; peak '
        f'{top:,.0f} GFLOP/s', flush=True
    )
    if what == 'sample':
        for line in sample_lines(micro_batch):
            print(mark + line, flush=True)
    else:
        for multiple in (multiples or ('1,4' if one_gpu else '1')).split(','):
            for line in step_lines(int(multiple) * micro_batch, top, names):
                print(mark + line, flush=True)
    print(f'{mark}peak afterwards {peak(device, compute_dtype, repeats):,.0f} GFLOP/s')
    M.finish()
