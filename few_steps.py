"""
Trains a student that makes an image in one, two or four evaluations from a diffusion model that
takes many, without its training data: the student learns finished walks of the teacher, from noise
to image. This method is in neither paper; it generalises Luhman & Luhman (2021) and progressive
distillation (docs/papers.md).

    python few_steps.py  # a digit in one evaluation, minutes on a laptop
    python few_steps.py --jumps=2                           # in two
    # the student begins as a copy of its teacher
    python few_steps.py --student=teacher --student_prediction=teacher --lr=1e-3
    # a rank per core
    torchrun --nproc_per_node=2 few_steps.py config/few_steps_cifar10.py
    # its student goes on against a discriminator, on the first 2,048 of its own walks
    torchrun --nproc_per_node=2 few_steps.py config/few_steps_cifar10.py --discriminator=0.5 \\
        --lr=1e-4 --lr_warmup=40 --max_steps=150 --walks=2048 --out_dir=out/discriminator \\
        --init_from=out/few_steps_cifar10/student.safetensors
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
lora_rank = 0                # above 0, with student='teacher' and a teacher of texts: only LoRA
                             # adapters of this rank are trained, for what the teacher predicts
student_prediction = 'x0'    # 'x0', 'v', 'flow', or 'teacher': the same as the teacher's. With 'v'
                             # and several jumps, some of the noise of x_t stays in the images
# distillation
jumps = 1                    # evaluations of the student per image
walks = 2048                 # finished walks of the teacher, over all ranks
walk_steps = 16              # teacher evaluations per walk, a multiple of jumps
walk_sampler = 'ddim'        # 'ddim', or 'dpm++', which needs half as many evaluations
unguided_steps = 0           # how many of a walk's last steps are not guided: guidance overshoots
                             # there
loss = 'l1'                  # 'l1' (absolute error, clearer images) or 'l2' (squared error)
discriminator = 0.0          # one evaluation: weight of a discriminator's gradient, where the
                             # gradient of the absolute error has the weight 1; 0 for none. For a
                             # student that is trained already (--init_from), on its own walks: the
                             # same seed, batch_size, grad_accum, number of ranks and kind of walks
                             # make them again
discriminator_lr = 2e-3      # the discriminator's learning rate, which does not decay
uncond_prob = 0.0            # conditional students: how often the condition is replaced by the
                             # null condition
# optimisation
max_steps = 2000
batch_size = 64              # over all ranks and accumulation steps
grad_accum = 1               # accumulation steps
lr = 4e-3
lr_warmup = 50               # steps of linear warm-up
lr_decay = True              # cosine decay to 0 at max_steps
adamw = {'beta2': 0.99, 'weight_decay': 0.0}
grad_clip = 1.0              # largest norm of the gradient; 0 for none
ema = 0.999                  # decay of the averaged weights, which are the result
# system
out_dir = 'out/few_steps'
init_from = 'scratch'        # 'scratch'; 'resume'; 'overwrite' begins anew where an unfinished run
                             # lies; a student's file to start from; or 'teacher': all tensors of
                             # the teacher that fit (docs/reference.md)
log_every = 20               # steps between rows of log.csv
save_every = 1000            # steps between checkpoints (with samples.png)
seed = 0
device = 'auto'              # 'auto', 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16',
                             # 'float32'
compile = False              # torch.compile of each kind of block, for GPUs; with a discriminator
                             # only of the student's
graph = True                 # on one GPU, without a discriminator: the whole step as one CUDA graph
wandb = ''                   # a Weights & Biases project, '' for none
_ranges = {                  # allowed values of string settings
    'loss': ('l1', 'l2'), 'walk_sampler': ('ddim', 'dpm++'),
    'student_prediction': ('x0', 'v', 'flow', 'teacher'),
    'dtype': ('auto', 'bfloat16', 'float32')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import contextlib
import copy
import shlex
import time

import torch
from tqdm import tqdm

import models as M

students = M.adapter('students')


# ==== the method ====
#   walks <- deterministic walks of the teacher; jumps + 1 states of each are kept
#   repeat:
#       x_t, x_s <- neighbouring states of randomly drawn walks
#       x_0* = the x_0 whose DDIM step from x_t to s lands on x_s                          jump_x0
#       student <- student - lr grad |out - (x_0* as the student's prediction)|
#   with a discriminator D, for one jump:
#       student <- student + lr grad D(teacher's inner maps of a new image of the student)
#       D learns to tell images of the walks from images of the student
class Walks:
    """Finished walks of the teacher: x (jumps + 1, N, C, H, W), the states at `times`, from noise
    to image. N is `size`, rounded up to whole batches. draw_labels(n) gives the conditions y of new
    walks, or None."""

    def __init__(
        self, size, jumps, steps, shape, diffusion, batch_size, draw_labels=lambda n: None,
        device='cpu'
    ):
        M.check(
            1 <= jumps and steps % jumps == 0,
            f'walk_steps={steps} must be a multiple of jumps={jumps}'
        )
        size = batch_size * -(-size // batch_size)
        self.diffusion = diffusion
        self.draw_labels = draw_labels
        self.batch_size = batch_size
        self.filled = 0  # so many walks are finished
        self.all_times = M.sampling_steps(diffusion.T, steps) + [-1]
        self.every = steps // jumps
        self.times = torch.tensor(self.all_times[:: self.every], device=device)
        self.x = torch.zeros(jumps + 1, size, *shape, device=device)
        self.y = None if draw_labels(0) is None else torch.full((size,), -1, device=device)

    @torch.no_grad()
    def fill(self, teachers, sampler='ddim', progress=True, stopping=lambda: False):
        """Walks from noise to image, a batch at a time; teachers[k](x_t, t, y) is asked at step k.
        It ends before the next batch once stopping() is true, and goes on there when it is called
        again. Returns the number of teacher evaluations."""
        device = self.x.device
        size = self.x.shape[1]
        steps = list(zip(teachers, self.all_times, self.all_times[1:]))
        bar = tqdm(
            total=size * len(steps), desc='the teacher walks', disable=not progress, leave=False,
            initial=self.filled * len(steps)
        )
        begin = self.filled
        for i in range(begin, size, self.batch_size):
            if stopping():
                break
            place = slice(i, i + self.batch_size)
            x_t = torch.randn(self.batch_size, *self.x.shape[2:], device=device)
            y = self.draw_labels(self.batch_size)
            self.x[0, place] = x_t
            before = None  # DPM-Solver++ needs the step before
            for k, (teacher, t, s) in enumerate(steps, 1):
                tt = torch.full((self.batch_size,), t, device=device)
                out = teacher(x_t, tt, y)
                if sampler == 'ddim':
                    x_t = self.diffusion.ddim_step(out, x_t, tt, s)
                else:
                    x0 = self.diffusion.predict_x0(out, x_t, tt)
                    x_t = M.dpm_step(self.diffusion, x_t, t, s, x0, before)
                    before = t, x0
                if k % self.every == 0:
                    self.x[k // self.every, place] = x_t
                bar.update(self.batch_size)
            if y is not None:
                self.y[place] = y
            self.filled = i + self.batch_size
        bar.close()
        return (self.filled - begin) * len(steps)

    def draw(self, n):
        """n random jumps of random walks: (x_t, t, x_s, s, y)."""
        device = self.x.device
        idx = torch.randint(self.x.shape[1], (n,), device=device)
        k = torch.randint(len(self.x) - 1, (n,), device=device)
        y = None if self.y is None else self.y[idx]
        return self.x[k, idx], self.times[k], self.x[k + 1, idx], self.times[k + 1], y

    def state(self):
        return {'x': self.x, 'y': self.y, 'filled': self.filled}

    def load(self, state):
        """Takes over a state, in the memory that a CUDA graph knows."""
        self.x.copy_(state['x'])
        self.filled = state.get('filled', self.x.shape[1])
        if self.y is not None:
            self.y.copy_(state['y'])


def jump_x0(diffusion, x_t, t, x_s, s):
    """The x_0 whose deterministic DDIM step from x_t to s lands on x_s (B, C, H, W).

    It solves x_s = a_s x_0 + b_s (x_t - a_t x_0) / b_t for x_0. At s = -1 that is x_s itself
    (Luhman & Luhman 2021); where x_s comes from two DDIM steps, it is the target of progressive
    distillation (Salimans & Ho 2022).
    """
    a_t, b_t = diffusion.ab(t, x_t)
    a_s, b_s = diffusion.ab(s, x_t)
    return ((x_s - b_s / b_t * x_t) / (a_s - a_t * b_s / b_t)).to(x_t)


def jump_step(
    student, walks, diffusion, batch_size, loss='l1', autocast=contextlib.nullcontext(),
    loss_scale=1.0
):
    """Adds the gradient of the student's loss, 'l1' or 'l2', on one batch of jumps. Returns the
    loss terms, {name: mean}."""
    x_t, t, x_s, s, y = walks.draw(batch_size)
    x0 = jump_x0(diffusion, x_t, t, x_s, s)
    with autocast:
        out = student(x_t, t, y)
    if diffusion.prediction == 'eps':  # its error would hardly count where x_t is nearly all noise
        error = diffusion.predict_x0(out, x_t, t) - x0
    else:
        error = out[:, : x0.shape[1]].float()
        error = error - diffusion.target(x0, x_t, t, diffusion.prediction)
    error = error.abs() if loss == 'l1' else error**2
    return M.mean_and_backward({loss: error.mean((1, 2, 3))}, loss_scale)


def blocks_of(net):
    """The blocks of a network: the members of its outermost ModuleLists."""
    blocks = []
    for child in net.children():
        if isinstance(child, torch.nn.ModuleList):
            blocks += child.children()
        else:
            blocks += blocks_of(child)
    return blocks


def inner_maps(net, x_t, t, y):
    """Runs a denoiser on x_t (B, C, H, W) and returns the outputs of its blocks, each (B, positions
    or tokens, channels), in float32."""
    maps = []

    def keep(block, inputs, out):
        outputs = out if isinstance(out, tuple) else (out,)
        for m in outputs:
            if torch.is_tensor(m) and m.dim() == 4:
                m = m.flatten(2).transpose(1, 2)
            if torch.is_tensor(m) and m.dim() == 3:
                maps.append(m.float())

    hooks = [block.register_forward_hook(keep) for block in blocks_of(net)]
    net(x_t, t, y)
    for hook in hooks:
        hook.remove()
    return maps


class Discriminator(torch.nn.Module):
    """Tells the teacher's images from the student's, position by position, by what the teacher's
    blocks make of them: a small head for each block (as in LADD, Sauer et al. 2024). `maps`: an
    example of `inner_maps`."""

    def __init__(self, maps, width=64):
        super().__init__()
        self.heads = torch.nn.ModuleList()
        for m in maps:
            channels = m.shape[2]
            self.heads.append(
                torch.nn.Sequential(
                    torch.nn.LayerNorm(channels), torch.nn.Linear(channels, width),
                    torch.nn.SiLU(), torch.nn.Linear(width, 1)
                )
            )

    def forward(self, maps):
        """A list of (B, positions, 1), above 0 for images that seem to be the teacher's."""
        return [head(m) for head, m in zip(self.heads, maps)]


def adversarial_step(
    student, net_D, opt_D, net_T, walks, diffusion, batch_size, weight=0.5,
    autocast=contextlib.nullcontext(), loss_scale=1.0
):
    """Adds the gradient of a student of one evaluation against a discriminator, and trains that.

    New images of the student get a gradient that raises the discriminator's score; its RMS is
    `weight` times that of a mean absolute error. Then `net_D` takes one step of the hinge loss
    between these images and images of the walks. It sees both through `net_T`, the teacher's
    network, slightly noised: with much noise they cannot be told apart. Returns the hinge loss of
    a head, which is 2 if it cannot tell them apart.
    """
    diffusion_T = walks.diffusion
    latest = max(1, diffusion_T.T * 6 // 100)

    def maps_of(x0, y):
        t = torch.randint(latest, (batch_size,), device=x0.device)
        x_t = diffusion_T.q_sample(x0, t, torch.randn_like(x0))
        with autocast:
            return inner_maps(net_T, x_t, t, y)

    z = torch.randn(batch_size, *walks.x.shape[2:], device=walks.x.device)
    y = walks.draw_labels(batch_size)
    t = torch.full((batch_size,), diffusion.T - 1, device=z.device)
    with autocast:
        out = student(z, t, y)
    x0 = diffusion.predict_x0(out, z, t)
    seen = x0.detach().requires_grad_()
    maps_S = maps_of(seen, y)
    scores = getattr(net_D, 'module', net_D)(maps_S)  # not through DDP: the heads do not learn here
    score = sum(v.mean(1).sum() for v in scores)
    gradient = torch.autograd.grad(-score, seen)[0]
    gradient = weight * gradient / gradient.square().mean().sqrt().clamp(min=1e-12)
    ((x0 * gradient).mean() * loss_scale).backward()

    idx = torch.randint(walks.x.shape[1], (batch_size,), device=z.device)
    with torch.no_grad():
        maps_T = maps_of(walks.x[-1, idx], None if walks.y is None else walks.y[idx])
    scores = net_D([torch.cat([a, b.detach()]) for a, b in zip(maps_T, maps_S)])
    hinge = 0.0
    for v in scores:
        real, fake = v.split(batch_size)
        hinge = hinge + (1 - real).relu().mean() + (1 + fake).relu().mean()
    hinge.backward()
    M.optimizer_step(net_D, opt_D, 1.0)
    return hinge.detach() / len(scores)


# ==== set-up ====
if __name__ == '__main__':
    config = {k: globals()[k] for k in _defaults}
    M.check(max_steps > 0, f'max_steps={max_steps} must be above 0')
    M.check(batch_size > 0 and grad_accum > 0, 'batch_size and grad_accum must be above 0')
    M.check(walks > 0, f'walks={walks} must be above 0')
    M.check(
        0 <= unguided_steps <= walk_steps,
        f'unguided_steps={unguided_steps} must be from 0 to walk_steps={walk_steps}'
    )
    M.check(0 <= ema < 1, f'ema={ema} must be from 0 to below 1')
    M.check(0 <= uncond_prob <= 1, f'uncond_prob={uncond_prob} must be from 0 to 1')
    dev, autocast, rank, world = M.init_distributed(device, dtype, seed)
    micro_batch = M.per_rank(batch_size, world, grad_accum)  # images of one forward pass
    compute_dtype = M.pick_dtype(dev, dtype)
    if wandb:
        import wandb as wb

    # ---- teacher ----
    net_T, diffusion_T, guidance_T = M.load_teacher(
        teacher, teacher_config, guidance, prompts, dev, compute_dtype
    )
    M.check(
        uncond_prob == 0 or not getattr(net_T, 'no_null', False),
        f'uncond_prob={uncond_prob}: {teacher} has no null class to learn from'
    )
    config['teacher_digest'] = net_T.digest
    guided = guidance_T != 1 or getattr(net_T, 'guided', False)
    if rank == 0:
        students.warn_if_y_is_ignored(net_T, teacher, diffusion_T, dev, autocast)
    C, H = net_T.in_channels, net_T.image_size

    # ---- student ----
    sizes = {'lora_rank': lora_rank} | student_config
    M.check(
        discriminator == 0 or jumps == 1,
        'discriminator is for students of one evaluation: --jumps=1'
    )
    M.check(discriminator >= 0, f'discriminator={discriminator} must not be negative')
    # the student predicts what the teacher predicts
    same = student_prediction == 'teacher' or sizes['lora_rank']
    noise_only = diffusion_T.a[diffusion_T.T - 1] < 0.05  # at the start of a walk
    M.check(
        not (same and noise_only and diffusion_T.prediction == 'eps'),
        f'{teacher} predicts eps, which at the start of a walk, pure noise, does not determine '
        'x_0: use --student_prediction=x0, and no lora_rank'
    )
    # its sampler adds no noise, so it predicts no variance; x_0* averages clamped x_0s of the
    # teacher, so what it predicts needs no clamping
    net, diffusion = students.build_student(
        student, sizes | {'learn_sigma': False}, student_prediction, (C, H), net_T.num_classes,
        diffusion_T.config | {'clip': False}, (teacher, teacher_config, net_T), dev, init_from
    )
    checkpoint = M.resume(config, rank, net)
    net_ema = copy.deepcopy(net).eval().requires_grad_(False)
    graph_on = graph and dev.type == 'cuda' and world == 1 and discriminator == 0
    opt = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr, (0.9, adamw['beta2']),
        weight_decay=adamw['weight_decay'], fused=True
    )
    net_D = None
    if discriminator:
        t = torch.zeros(1, dtype=torch.long, device=dev)
        y = t if net_T.num_classes else None
        with torch.no_grad(), autocast:
            maps = inner_maps(net_T, torch.zeros(1, C, H, H, device=dev), t, y)
        M.check(
            maps, f'{teacher} has no ModuleList of blocks to look at: leave out discriminator'
        )
        net_D = Discriminator(maps).to(dev)
        opt_D = torch.optim.AdamW(
            net_D.parameters(), discriminator_lr, (0.5, 0.99), weight_decay=1e-4, fused=True
        )
    if compile:
        # the hooks of inner_maps, registered later, would not be called in compiled blocks
        M.compile_blocks(None if discriminator else net_T, net)
    model, model_D = net, net_D
    if world > 1:
        parallel = torch.nn.parallel.DistributedDataParallel
        model = parallel(
            net, gradient_as_bucket_view=True, find_unused_parameters=student not in M.DENOISERS
        )
        if discriminator:
            model_D = parallel(net_D, gradient_as_bucket_view=True)
    torch.manual_seed(seed * 1000 + rank + 1)  # from here on each rank draws its own random numbers
    begin = time.time()

    # ---- the walks, and the step ----
    source = Walks(
        -(-walks // world), jumps, walk_steps, (C, H, H), diffusion_T,
        micro_batch, M.make_labels(net_T.num_classes, uncond_prob, dev), dev
    )
    guided_T = M.make_teacher(net_T, guidance_T, autocast)
    decay = torch.zeros((), device=dev) if graph_on else 0.0  # of the average, at this step

    def one_step():
        """All that a step does on the device: a CUDA graph, where there is a GPU."""
        total = {}
        for i in range(grad_accum):
            if world > 1:
                model.require_backward_grad_sync = i == grad_accum - 1
            terms = jump_step(
                model, source, diffusion, micro_batch, loss, autocast, 1 / grad_accum
            )
            if discriminator:
                terms['hinge'] = adversarial_step(
                    model, model_D, opt_D, net_T, source, diffusion, micro_batch, discriminator,
                    autocast, 1 / grad_accum
                )
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + value / grad_accum
        total['grad_norm'] = M.optimizer_step(net, opt, grad_clip)
        M.update_ema(net_ema, net, decay)
        return total

    # ---- results on disk ----
    about = {'guided': guided, 'prompts': prompts}
    about['no_null'] = bool(net_T.num_classes) and uncond_prob == 0
    if getattr(net_T, 'vae', None):
        about['vae'] = net_T.source  # the teacher's pipeline
    of_diffusers = getattr(net, 'dtype_as_loaded', False)
    if of_diffusers:
        about['pipeline'] = getattr(net_T, 'source', '')
    about['sampling'] = dict(sampler='ddim', steps=jumps, spacing='trailing')
    last_pictures = time.time()

    def save_student():
        path = os.path.join(out_dir, 'student.safetensors')
        M.save_model(net_ema, path, diffusion, **about)

    def save_checkpoint():
        shared = {'ema': net_ema.state_dict(), 'evaluations': evaluations}
        if discriminator:
            shared['discriminator'] = {'net': net_D.state_dict(), 'opt': opt_D.state_dict()}
        own = {'walks': source.state(), 'sums': meter.sums}
        M.save_checkpoint(config, step, net, opt, shared, own, rank, step == max_steps)

    def save_pictures(seconds_per_pass):
        global last_pictures
        rows = [
            (net_T, diffusion_T, guidance_T, walk_steps, walk_sampler),
            (net_ema, diffusion, 1.0, jumps, 'ddim')
        ]
        path = os.path.join(out_dir, 'samples.png')
        M.save_samples(path, rows, net_T, seed, autocast, seconds_per_pass, last_pictures)
        last_pictures = time.time()

    # ---- where a run begins, or goes on ----
    stop = M.StopFlag()
    step, evaluations = 0, 0
    meter = M.Meter(dev)
    if checkpoint:
        shared, own = M.restore(checkpoint, opt)
        step, evaluations = shared['step'], shared['evaluations']
        meter = M.Meter(dev, own['sums'])
        net_ema.load_state_dict(shared['ema'])
        source.load(own['walks'])
        if discriminator:
            net_D.load_state_dict(shared['discriminator']['net'])
            M.restore((shared['discriminator'], own), opt_D)
        del checkpoint, shared, own  # they would stay in memory
    else:
        M.set_aside(out_dir, rank)
    if source.filled < source.x.shape[1]:
        if graph_on:
            M.graph_network(net_T, dev)
        unguided_T = M.make_teacher(net_T, 1.0, autocast)
        teachers = [guided_T] * (walk_steps - unguided_steps) + [unguided_T] * unguided_steps
        evaluations += source.fill(
            teachers, walk_sampler, rank == 0, lambda: M.all_reduce_max(stop.signal)
        )
        save_checkpoint()  # so that the walks are not lost
    leaving = M.all_reduce_max(stop.signal)
    if leaving and step == 0:
        if rank == 0:
            print(f'stopped before the first step; {source.filled:,} walks of each rank are saved')
        M.finish(leaving)
    if rank == 0:
        print(f'student {student}: {M.size_of(net)}, predicts {diffusion.prediction}')
        print(f'teacher {teacher}: {M.size_of(net_T)}, predicts {diffusion_T.prediction}')
        print(
            f'{jumps} evaluation(s) per image, {max_steps:,} steps of {batch_size} images of '
            f'{C}x{H}x{H} on {world} x {dev.type}, guidance {guidance_T:g}; {walks:,} walks, '
            f'{evaluations * world:,} teacher evaluations before the first step'
        )
        log = M.Log(os.path.join(out_dir, 'log.csv'), step)
        if wandb:
            wb.init(project=wandb, name=os.path.basename(out_dir), config=config)
    run_step = M.Graphed(one_step, dev, graph_on, opt)
    net.train()
    first = step
    start = time.time()  # of the loop; `seconds` in log.csv includes the walks
    paused = 0.0  # seconds spent on pictures
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
        logging = step % log_every == 0 or step == max_steps
        if logging or saving:
            means = meter.means(step, net, save_checkpoint, f'try a smaller --lr (now {rate:.2g})')
        if logging and rank == 0:
            other = {k: means.pop(k) for k in ('hinge', 'grad_norm') if k in means}
            row = dict(step=step, loss=sum(means.values()), **means, **other, lr=rate)
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            seconds = time.time() - start - paused
            row['images_per_s'] = (step - first) * batch_size / seconds
            row['seconds'] = log.seconds + start - begin + seconds
            log(**row)
            if wandb:
                wb.log(row, step=step)
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
