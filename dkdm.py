"""
DKDM: trains a small diffusion model of any architecture from a big pretrained one, without the data the big one was
trained on. The student learns from the teacher's own denoising steps (Xiang et al., CVPR 2025, arXiv 2409.03550).

    python dkdm.py                                                     # the bundled MNIST teacher, minutes on a laptop
    python dkdm.py config/dkdm_cifar10.py --teacher=cifar10_32.pt      # the paper's CIFAR-10 setting
    torchrun --nproc_per_node=8 dkdm.py config/dkdm_cifar10.py --rho=0.4
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 dkdm.py ...
    python dkdm.py config/mnist_teacher.py --data=mnist                # ordinary training on images makes a teacher
"""
import os
import time

# teacher
teacher = 'pretrained/mnist_classes.safetensors'  # a file of ours, an original ADM, DDPM-IP, DKDM, LDM or DiT
                             # checkpoint, or a diffusers folder or hub id
teacher_source = ''          # where a missing teacher is to be had, for the message
teacher_config = {}          # what an original checkpoint does not say: image_size, ... (models.load_denoiser)
guidance = 0.0               # teachers with classes or texts are distilled at this scale; 1 is none, 0 is 2 for them
prompts = ''                 # teachers with texts: a file of them, one per line
# student
student = 'unet'             # 'unet' or 'dit', whatever the teacher is; or the config.json of a model of diffusers
student_prediction = 'v'     # 'v', 'eps', 'x0', 'flow', or 'teacher': the same as the teacher's (the paper)
learn_sigma = True           # the student predicts its variance too, Eq. (12)
patch_size = 2               # pixels folded into channels (unet) or into a token (dit)
dropout = 0.0                # unet
model_channels = 28          # unet
num_res_blocks = 1           # unet
channel_mult = (1, 1)        # unet: channels per level, in model_channels
attention_resolutions = (7,) # unet: sides of the feature maps with attention
num_head_channels = 32       # unet: channels per attention head
resblock_updown = True       # unet: ADM's resampling blocks; False: LDM's strided convolutions
use_scale_shift_norm = True  # unet: t scales and shifts (ADM), or only shifts (LDM)
use_new_attention_order = True  # unet: ADM's order of the qkv channels, or LDM's
hidden_size = 128            # dit
depth = 6                    # dit
num_heads = 4                # dit
# distillation
method = 'dynamic'           # 'dynamic' (the paper's), 'shuffled', 'iterative' (its ablations), 'synthetic' (train on
                             # images the teacher made before), 'data' (ordinary training, no teacher)
rho = 0.4                    # the pool holds round(rho T / stride) batches of half-finished images
stride = 40                  # a visit moves an image about so many of the T steps; 1 is the paper
warmup_steps = 0             # teacher steps of a whole walk while the pool is filled; 0: T / stride, the paper: T
pool_dtype = 'float32'       # 'float32', 'float16' or 'bfloat16'
lam = 0.001                  # weight of L_vlb, Eq. (19)
uncond_prob = 0.0            # students with classes or texts: how often the null condition is trained
# images, for 'data' and 'synthetic'
data = ''                    # an .npz, a folder, or a torchvision name; with real_fraction: the real images
synthetic = ''               # 'synthetic': images made earlier; '' makes them now
synthetic_images = 2000      # how many to make
synthetic_steps = 50         # sampling steps of each
real_fraction = 0.0          # so much of the synthetic set is replaced by real images (Data-Limited Training)
flip = False                 # random horizontal flips
class_cond = False           # 'data': condition on the labels
schedule = 'cosine'          # 'data': 'cosine', 'linear', 'sqrt_linear', 'flow'; otherwise the teacher's
T = 1000                     # 'data': steps of the process; otherwise the teacher's
# optimisation
max_steps = 1000
batch_size = 32              # over all ranks and accumulation steps
grad_accum = 1               # accumulation steps
lr = 4e-3
lr_warmup = 50               # steps of linear warm-up
lr_decay = True              # cosine decay to 0 at max_steps
weight_decay = 0.0
beta2 = 0.99                 # AdamW's second beta
grad_clip = 1.0              # largest norm of the gradient; 0 for none
ema = 0.999                  # decay of the averaged weights, which are the result
# when to stop: the distance of 1,000 images of the EMA student, sampled as samples.png is, goes to log.csv, the best
# student to best.safetensors. A reference is data: who has none makes it from the teacher's own samples (eval_fid.py)
eval_every = 0               # steps between distances; 0 is never
eval_reference = 'pretrained/mnist_stats.npz'    # statistics that eval_fid.py --save_stats has made
eval_features = 'pretrained/mnist_resnet.safetensors'  # in the features of this classifier
# system
out_dir = 'out/dkdm'
init_from = 'scratch'        # 'scratch', 'resume', or the file of a student that goes on
log_every = 20               # steps between rows of log.csv
save_every = 1000            # steps between checkpoints (with samples.png)
sampler = 'ddim'             # of samples.png: 'ddpm', 'ddim' or 'dpm++'
sample_steps = 8             # evaluations of each image; the paper has 50 of ddpm for pixels, 200 of ddim for latents
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16', 'float32'
compile = False              # torch.compile, for GPUs
wandb = ''                   # a Weights & Biases project, '' for none
_ranges = {                  # what configurator.py does not know of itself
    'method': ('dynamic', 'shuffled', 'iterative', 'synthetic', 'data'),
    'student_prediction': ('v', 'eps', 'x0', 'flow', 'teacher'), 'sampler': ('ddpm', 'ddim', 'dpm++'),
    'schedule': ('cosine', 'linear', 'sqrt_linear', 'flow'), 'pool_dtype': ('float32', 'float16', 'bfloat16'),
    'rho': (1e-30, 1e30), 'T': (2, 10 ** 6), 'channel_mult': (0.01, 100), 'dropout': (0, 0.99), 'uncond_prob': (0, 1),
    'real_fraction': (0, 1), 'beta2': (0, 0.999999), 'ema': (0, 0.999999), 'lr_warmup': (0, 10 ** 9),
    'batch_size': (1, 10 ** 6)}
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in _defaults}

import copy
import importlib.util
import math
import random

import numpy as np
import torch
from tqdm import tqdm

import models as M

# ---- the method ----
#   pool <- rho T / stride batches, each image walked by the teacher from noise to a t of its own      Alg. 1, line 1
#   repeat:
#       x_t, t <- any batch of the pool                                                                        line 4
#       out_T = teacher(x_t, t);  out = student(x_t, t)
#       student <- student - lr grad |out - out_T|^2 + lam KL(p_T || p_S)                    lines 5-7, Eqs. (19)-(21)
#       x_s ~ p_T(x_s | x_t), s = t - stride: the teacher's own step moves the images                          line 8
#       finished images leave the pool, fresh noise enters it
def draw_labels(n):
    """Labels for n new images, -1 for the null condition; None for models without classes."""
    if not num_classes:
        return None
    y = torch.randint(num_classes, (n,), device=device)
    return torch.where(torch.rand(n, device=device) < uncond_prob, -1, y)


@torch.no_grad()
def teacher_eval(x_t, t, y):
    with autocast:
        return M.guided(run_T, x_t, t, y, guidance).float()


@torch.no_grad()
def shuffle_denoise():
    """Alg. 1, line 1: every image of the pool walks from noise to a t of its own, uniform over 0 ... T-1."""
    goal = torch.randint(T, (pool_size,)).sort().values if method != 'iterative' else torch.full((pool_size,), T - 1)
    walkers = torch.bincount(goal, minlength=T).cumsum(0).tolist()             # so many, the first, have a goal up to t
    goal = goal.to(device)
    levels = torch.linspace(T - 1, -1, warmup_steps + 1).round().long().tolist()
    evaluations = 0
    for t, s in tqdm(list(zip(levels, levels[1:])), desc='filling the pool', disable=rank > 0, leave=False):
        for i in range(0, walkers[t - 1] if t else 0, micro_batch):            # whole batches: some are at their goal
            x_t, x_goal = pool_x[i:i + micro_batch].float(), goal[i:i + micro_batch]
            tt, walking = torch.full_like(x_goal, t), x_goal < t
            out = teacher_eval(x_t, tt, None if pool_y is None else pool_y[i:i + micro_batch])
            x_s = diffusion_T.ddpm_step(out, x_t, tt, x_goal.clamp(min=s))
            pool_x[i:i + micro_batch] = torch.where(walking.view(-1, 1, 1, 1), x_s, x_t).to(pool_x.dtype)
            pool_t[i:i + micro_batch] = torch.where(walking, x_goal.clamp(min=s), pool_t[i:i + micro_batch])
            evaluations += micro_batch
    return evaluations


def distill_batch(idx):
    """Lines 4-8 of Alg. 1 on the pool's images idx: the student's losses, and the pool moved on."""
    x_t, t, y = pool_x[idx].float(), pool_t[idx], None if pool_y is None else pool_y[idx]
    out_T = teacher_eval(x_t, t, y)
    with autocast:
        out = model(x_t, t, y)
    target = diffusion_T.convert(out_T, x_t, t, diffusion.prediction)
    losses = diffusion.distill_loss(out, target, x_t, t, lam)                  # Eqs. (19)-(21)

    # the same evaluation moves the teacher's walk: x_t -> x_s, a jump of stride give or take a half
    low, high = (stride + 1) // 2, stride + stride // 2
    if method == 'iterative':                                                  # all images share one t, on all ranks
        jump = random.Random(step).randint(low, high)
    else:
        jump = torch.randint(low, high + 1, t.shape, device=device)
    s = (t - jump).clamp(min=-1)
    x_s = diffusion_T.ddpm_step(out_T, x_t, t, s)
    # finished images leave, fresh noise enters
    done = s < 0
    pool_x[idx] = torch.where(done.view(-1, 1, 1, 1), torch.randn_like(x_s), x_s).to(pool_x.dtype)
    pool_t[idx] = torch.where(done, T - 1, s)
    if pool_y is not None:
        pool_y[idx] = torch.where(done, draw_labels(len(idx)), y)
    return losses


def image_batch(n):
    """Ordinary training, Eq. (13): images, noised to a uniform t."""
    idx = torch.randint(len(images), (n,), device=device)
    x0, y = M.to_float(images[idx]), None
    if num_classes:
        y = torch.where(torch.rand(n, device=device) < uncond_prob, -1, labels[idx])
    if flip:
        x0 = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x0.flip(-1), x0)
    t, noise = torch.randint(T, (n,), device=device), torch.randn_like(x0)
    x_t = diffusion.q_sample(x0, t, noise)
    with autocast:
        out = model(x_t, t, y)
    return diffusion.training_loss(out, x0, x_t, t, noise, lam)


# ---- check everything before any work starts ----
walks = method in ('dynamic', 'shuffled', 'iterative')
for wrong, message in [
        (method == 'data' and guidance > 1,
         f"guidance={guidance}: method='data' has no teacher to guide; eval_fid.py guides what it samples"),
        (method == 'data' and not data, "method='data' needs images: --data=mnist, an .npz or a folder"),
        (real_fraction and (method != 'synthetic' or not data),
         f"real_fraction={real_fraction} mixes real images, --data=..., into those of method='synthetic'"),
        (wandb and importlib.util.find_spec('wandb') is None, f'wandb={wandb} needs its package: pip install wandb')]:
    if wrong:
        M.die(message)
device, autocast, rank, world = M.start(device, dtype, seed)
micro_batch = M.share(batch_size, world, grad_accum)                           # images of one forward pass

# ---- teacher, images, student ----
try:
    net_T, diffusion_T, sets = None, None, {}
    if method == 'data':
        sets[data] = M.load_images(data)
        C, H = sets[data][0].shape[1:3]
        num_classes = int(sets[data][1].max()) + 1 if class_cond and sets[data][1] is not None else int(class_cond)
        process = dict(schedule=schedule, steps=T)
    else:
        net_T, diffusion_T = M.load_denoiser(teacher, M.pick_dtype(device, dtype), **teacher_config)
        config['teacher_digest'] = M.digest(net_T)
        net_T = M.cast_frozen(net_T.to(device, memory_format=M.memory_format(device)), M.pick_dtype(device, dtype))
        if getattr(net_T, 'condition', '') == 'text':
            net_T.set_prompts(M.read_lines(prompts, f'{teacher} takes texts: --prompts=file.txt'),
                              os.path.join(out_dir, 'prompts.safetensors'))
        T, C, H = diffusion_T.T, net_T.config['in_channels'], net_T.config['image_size']
        num_classes, process = net_T.num_classes, diffusion_T.config
        if stride > T or warmup_steps > T:
            raise ValueError(f'stride={stride}, warmup_steps={warmup_steps}: the teacher has T={T} steps')
        guidance = guidance or (2. if num_classes else 1.)
        if guidance != 1 and not num_classes:
            raise ValueError(f'guidance={guidance}: {teacher} has no classes or texts to be guided to')
        if method == 'synthetic':
            if not diffusion_T.clip:
                raise ValueError("method='synthetic' stores images, this teacher makes latents: method='dynamic' can")
            sets = {s: M.load_images(s) for s in (synthetic, data if real_fraction else '') if s}
    for spec, (images, labels) in sets.items():
        if images.shape[1:] != (C, H, H):
            raise ValueError(f'{spec}: its images are {tuple(images.shape[1:])}, {(C, H, H)} are wanted')
        if num_classes and (labels is None or labels.max() >= num_classes):
            raise ValueError(f"{spec} needs labels 0 ... {num_classes - 1} ('arr_1', or a subfolder per class)")
    if prompts and getattr(net_T, 'condition', '') != 'text':
        raise ValueError(f'prompts={prompts}: {teacher if net_T else method} takes no texts')
    prediction = process.get('prediction', 'v') if student_prediction == 'teacher' else student_prediction
    net = M.make_student(config, C, H, num_classes, net_T, device)
    if isinstance(net, M.Pipeline):
        learn_sigma, flows = net.config['out_channels'] == 2 * C, process['schedule'] == 'flow'
        if (prediction == 'flow') != flows or flows and (not net_T or net.config['class'] != net_T.config['class']):
            raise ValueError(f'{student}, student_prediction={student_prediction}: diffusers samples a flow only by '
                             "the teacher's class, and flow predictions only of a flow: --student_prediction=teacher")
    diffusion = M.make('Diffusion', **process | dict(prediction=prediction, learn_sigma=learn_sigma))
    M.sampling_steps(diffusion.T, sample_steps)
    M.sampling_steps(diffusion.T, synthetic_steps if method == 'synthetic' and not synthetic else 1)
    pool_batches = max(1, round(rho * T / stride)) if method == 'dynamic' else 1
    pool_size = pool_batches * batch_size // world if walks else 0
    pool_bytes = pool_size * C * H * H * torch.finfo(getattr(torch, pool_dtype)).bits // 8
    free = M.free_memory(device)
    if pool_bytes > free:
        raise ValueError(f'the pool of {pool_size:,} images takes {pool_bytes / 2 ** 20:,.0f} MB, there are '
                         f'{free / 2 ** 20:,.0f}: a smaller --rho, a larger --stride, or --pool_dtype=float16')
    if eval_every:
        net_F, space, D = M.load_features(eval_features, device)
        made, wanted = 3 if M.has_vae(net_T) else C, net_F.config.get('in_channels', 3)
        if made != wanted:
            raise ValueError(f'eval_features={eval_features} takes {wanted} channels, the images have {made}: '
                             'a classifier of such images')
        reference = M.read_statistics(eval_reference, space, {'mu': D})
        if reference is None:
            raise ValueError(f'eval_reference={eval_reference} holds no statistics: eval_fid.py --save_stats')
    checkpoint = M.resume(config, rank, net, pool_bytes * world + 16 * sum(p.numel() for p in net.parameters()))
except (ValueError, RuntimeError, TypeError) as e:
    M.die(f'{e}; get {teacher_source}' if teacher_source and not os.path.exists(teacher) else str(e))
warmup_steps = warmup_steps or max(1, T // stride)
net = net.to(device, memory_format=M.memory_format(device))
net_ema = copy.deepcopy(net).eval().requires_grad_(False)
opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr, (0.9, beta2), weight_decay=weight_decay,
                        fused=True)
# the same weights, for the loop
run_T, model = (torch.compile(n, dynamic=False) if compile and n else n for n in (net_T, net))
if world > 1:
    model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
torch.manual_seed(seed * 1000 + rank + 1)                                      # from here on every rank has its luck
if prompts and rank == 0:
    net_T.keep_prompts(os.path.join(out_dir, 'prompts.safetensors'))
if rank == 0:
    for role, name, n, d in (('student', student, net, diffusion), ('teacher', teacher, net_T, diffusion_T)):
        if n is not None:
            size = sum(p.numel() for p in n.parameters())
            print(f'{role} {name}: {size / 1e6:.2f} M parameters, predicts {d.prediction}')
    print(f'{method}, {max_steps:,} steps of {batch_size} images of {C}x{H}x{H} on {world} x {device.type}'
          + (f', guidance {guidance:g}' if guidance > 1 else '')
          + (f'; a pool of {pool_size * world:,} images, {pool_bytes * world / 2 ** 20:.1f} MB' if walks else ''))


# ---- where (x_t, t, target) come from ----
t0, step, evaluations, best = time.time(), 0, 0, math.inf
pool_x = pool_t = pool_y = None
if walks and checkpoint:
    pool_x, pool_t, pool_y = (v if v is None else v.to(device) for v in checkpoint[1]['pool'])
elif walks:
    pool_x = torch.randn(pool_size, C, H, H, device=device).to(getattr(torch, pool_dtype))
    pool_t = torch.full((pool_size,), T - 1, device=device)
    pool_y = draw_labels(pool_size)
    evaluations = shuffle_denoise()
elif method == 'data' or synthetic:
    images, labels = sets[data if method == 'data' else synthetic]
else:                                                                          # Data-Free Training: the teacher's own
    path, n = os.path.join(out_dir, f'synthetic_rank{rank}.npz'), -(-synthetic_images // world)
    if not checkpoint:                                                         # a resumed run has the same
        batches = []
        for i in tqdm(range(0, n, micro_batch), desc='making images', disable=rank > 0, leave=False):
            shape = min(micro_batch, n - i), C, H, H
            y = draw_labels(shape[0])
            with autocast:
                x = M.sample(net_T, diffusion_T, shape, synthetic_steps, 'ddpm', y, guidance, spacing='even')
            batches.append([M.to_uint8(x).permute(0, 2, 3, 1).cpu()] + ([y.cpu()] if num_classes else []))
        arrays = {f'arr_{i}': torch.cat(parts).numpy() for i, parts in enumerate(zip(*batches))}
        M.write_atomically(path, lambda tmp: np.savez_compressed(tmp, **arrays))
    images, labels = M.load_npz(path)
    evaluations = len(images) * synthetic_steps
if real_fraction:                                                              # Data-Limited Training
    real, real_labels = sets[data]
    picked = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed + rank))
    picked = picked[:round(real_fraction * len(images))]
    made = len(images) - len(picked)
    images = torch.cat([images[:made], real[picked]])
    labels = torch.cat([labels[:made], real_labels[picked]]) if num_classes else None
if not walks:
    images, labels = images.to(device), labels.to(device) if num_classes else None


# ---- results on disk ----
source = getattr(net_T, 'source', '')                                          # the teacher's pipeline, if it has one
about = dict(guided=guidance > 1, vae=source if M.has_vae(net_T) else '',
             pipeline=source if isinstance(net, M.Pipeline) else '')


def save_result():
    """The student (its EMA), and samples.png, each row of the teacher's above the student's from the same noise."""
    M.save_model(net_ema, os.path.join(out_dir, 'student.safetensors'), diffusion, **about)
    y = torch.arange(36, device=device) % 12 % num_classes if num_classes else None
    both, sets = [(net_T, diffusion_T, guidance)] * (method != 'data') + [(net_ema, diffusion, 1.)], []
    for n, d, g in both:
        noise = torch.Generator(device).manual_seed(seed)                      # the same at every step for both
        with autocast:
            sets.append(M.decode(net_T, M.sample(n, d, (36, C, H, H), sample_steps, sampler, y, g, noise)))
    M.save_grid(os.path.join(out_dir, 'samples.png'), sets, 12)


def save_checkpoint():
    shared = {'ema': net_ema.state_dict(), 'evaluations': evaluations, 'best': best}
    own = {'pool': (pool_x, pool_t, pool_y), 'weights': M.digest(net), 'sums': sums}
    M.save_checkpoint(config, step, net, opt, shared, own, rank)


@torch.no_grad()
def distance():
    """The Frechet distance of 1,000 images of the student (its EMA), always from the same noise, to eval_reference."""
    g, found = torch.Generator(device).manual_seed(seed), []
    for _ in range(10):
        y = torch.randint(num_classes, (100,), generator=g, device=device) if num_classes else None
        with autocast:
            x = M.decode(net_T, M.sample(net_ema, diffusion, (100, C, H, H), sample_steps, sampler, y, 1., g))
        found.append(M.features(net_F, M.to_uint8(x))[0].cpu().double())
    f = torch.cat(found)
    return M.frechet_distance(f.mean(0), f.T.cov(), reference['mu'], reference['sigma'])[0]


sums = torch.zeros(5, device=device)                                           # on the device: no wait between two rows
if checkpoint:
    shared, own = M.go_on(checkpoint, opt)
    step, evaluations, best, sums = shared['step'], shared['evaluations'], shared['best'], own['sums'].to(device)
    net_ema.load_state_dict(shared['ema'])
elif walks:
    save_checkpoint()                                                          # the warm-up is not to be lost
if rank == 0:
    log = M.Log(os.path.join(out_dir, 'log.csv'), step)
    t0 -= log.seconds
    if wandb:
        import wandb as wb
        wb.init(project=wandb, name=os.path.basename(out_dir), config=config)
    if walks or method == 'synthetic':
        print(f'{evaluations * world:,} teacher evaluations before the first step')

# ---- the loop ----
stop = M.stop_flag()
net.train()
t1, first, leaving = time.time(), step, 0
bar = tqdm(total=max_steps, initial=step, disable=rank > 0, mininterval=1)
while step < max_steps:
    scale = min(1., (step + 1) / max(1, lr_warmup))
    if lr_decay:
        scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
    opt.param_groups[0]['lr'] = lr * scale
    if walks:
        # B_j^s: any batch of the pool (Alg. 1, line 4); the other methods have no other
        draw = torch.randperm if method == 'dynamic' else torch.arange
        order = draw(pool_size, device=device)
    for i in range(grad_accum):
        if world > 1:
            model.require_backward_grad_sync = i == grad_accum - 1
        losses = distill_batch(order[i * micro_batch:(i + 1) * micro_batch]) if walks else image_batch(micro_batch)
        (losses['loss'].mean() / grad_accum).backward()
        sums[:3] += torch.stack([losses[k].detach().mean() for k in ('loss', 'mse', 'vb')]) / grad_accum
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or float('inf'))
    opt.found_inf = (~norm.isfinite()).float()                                 # the fused step then changes nothing
    sums[3:] += torch.stack([norm, torch.ones_like(norm)])                     # ... and the number of steps
    opt.step()
    opt.zero_grad(set_to_none=True)
    M.update_ema(net_ema, net, ema, step)
    step += 1
    bar.update()
    leaving = (world == 1 or step % 5 == 0) and M.largest(sum(stop[:1]))
    saving = step % save_every == 0 or step == max_steps or leaving
    evaluating = eval_every and (step % eval_every == 0 or step == max_steps)
    if step % log_every == 0 or saving or evaluating:
        loss, mse, vb, norm, _ = (sums / sums[-1]).tolist()
        if not math.isfinite(norm):                                            # the same on all ranks, as gradients are
            bar.close()
            M.die(f'step {step}: the loss or its gradient was not finite since the last row; nothing of that reached '
                  f'the weights. Try a smaller --lr (now {lr * scale:.2g})')
    if step % log_every == 0 or step == max_steps or evaluating:
        if rank == 0:
            bar.set_postfix(loss=f'{loss:.4f}')
            row = dict(step=step, loss=loss, mse=mse, vb=vb, grad_norm=norm, lr=lr * scale)
            if eval_every:
                before = time.time()
                row['frechet'] = distance() if evaluating else ''
                if evaluating and row['frechet'] < best:
                    best = row['frechet']
                    M.save_model(net_ema, os.path.join(out_dir, 'best.safetensors'), diffusion, **about)
                t0, t1 = (t + time.time() - before for t in (t0, t1))          # the clock is of the training
            row |= dict(images_per_s=(step - first) * batch_size / (time.time() - t1), seconds=time.time() - t0)
            log(**row)
            if wandb:
                wb.log({k: v for k, v in row.items() if v != ''}, step=step)
        sums.zero_()
    if saving:
        save_checkpoint()                                                      # first: who stops us may not wait
        if rank == 0:
            save_result()
    if leaving:
        break
bar.close()
if rank == 0:
    if step == first:                                                          # killed between checkpoint and result
        save_result()
    path = f'{out_dir}/student.safetensors'
    print(f'step {step} of {max_steps}, {time.time() - t0:.0f} s; student: {path}, pictures: {out_dir}/samples.png')
    print(f'evaluate: python eval_fid.py --models={path}' + (f',{teacher}' if method != 'data' else '')
          + (f' --guidance={guidance}' if guidance > 1 else '') + (f' --prompts={prompts}' if prompts else '')
          + (f' --sampler={sampler} --steps={sample_steps}' if (sampler, sample_steps) != ('ddim', 8) else '')
          + (f' --features={eval_features} --reference={eval_reference}'
             if eval_features != _defaults['eval_features'] else ''))
    if isinstance(net, M.Pipeline):
        print(f'for diffusers: python export.py --model={path} --out_dir={out_dir}/pipeline')
    if wandb:
        wb.finish()
M.leave(leaving)
