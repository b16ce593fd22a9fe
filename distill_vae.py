"""
Distils a hierarchical VAE into a smaller one, without the data it was trained on: both decoders are fed the same noise
at every level, and the student learns the Gaussians and the pixels that the teacher makes of it. On synthetic images
its encoder learns too. With `method='data'` it trains a VAE on images, which is how teachers are made.

    python distill_vae.py                                              # the bundled MNIST teacher, minutes on a laptop
    python distill_vae.py config/mnist_lvae.py                         # the bundled teacher itself, by the ELBO
    python synthesize.py config/synth_mnist_vae.py && python distill_vae.py --method=synthetic --data=out/synth_vae
    torchrun --nproc_per_node=8 distill_vae.py config/vae_cifar10.py
    python distill_vae.py --teacher=stabilityai/sd-vae-ft-mse --method=synthetic --data=folder/ \
        --student_config="{'block_out_channels': (32, 64, 128, 128)}"
"""
import os
import time

# teacher
teacher = 'pretrained/mnist_lvae.safetensors'  # an LVAE of ours; AutoencoderKL or AutoencoderTiny: a folder or hub id
teacher_source = ''          # where a missing teacher is to be had, for the message
# student
student_config = {'width': 8}  # what differs from the teacher's config, of the same class; of 'data' an LVAE's config
# distillation
method = 'prior'             # 'prior' (noise only), 'synthetic' (images too, of any origin), 'data' (the ELBO, alone)
beta = 0.1                   # the pixels' variance is beta / 2
lam_z = 0.1                  # weight of the distances between the two networks' Gaussians
data = ''                    # 'synthetic' and 'data': an .npz, a folder, or a torchvision name
flip = False                 # random horizontal flips
kl_warmup = 500              # 'data': steps in which the weight of the KL grows from 0 to 1; 0 for none
# optimisation
max_steps = 1800
batch_size = 32              # over all ranks; the slides have 128
lr = 1e-2                    # the slides have 1e-4, for 50 epochs
lr_decay = True              # cosine decay to 0 at max_steps
weight_decay = 1e-4          # Adam's, on the gradient
grad_clip = 0.0              # largest norm of the gradient; 0 for none
# system
out_dir = 'out/vae'
init_from = 'scratch'        # 'scratch' or 'resume'
log_every = 20               # steps between rows of log.csv
save_every = 600             # steps between checkpoints (with pictures)
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16', 'float32'
compile = False              # torch.compile, for GPUs
_ranges = {'method': ('prior', 'synthetic', 'data'), 'init_from': ('scratch', 'resume'), 'beta': (1e-30, 1e30),
           'kl_warmup': (0, 10 ** 9), 'batch_size': (1, 10 ** 6)}    # what configurator.py does not know of itself
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
settings = {k: globals()[k] for k in _defaults}

import math

import torch
from tqdm import tqdm

import models as M

# ---- the method ----
#   noise ~ N(0, 1) at every level of the ladder
#   out_T, p_T = teacher.decode(noise);  out, p = student.decode(noise)
#   L = KL(N(out_T, beta / 2) || N(out, beta / 2)) + lam_z sum over levels of W2^2(p_T, p)
# On images x the same once more below the encoders' Gaussians: q_T from teacher.encode(x), q from student.encode(x).
def wasserstein(a, b):
    """Squared 2-Wasserstein distance of diagonal Gaussians (mean, std), averaged over their numbers."""
    return ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2).mean()


def output_kl(out_S, out_T):
    """KL of two decoders' pixels, Gaussians of variance beta / 2, summed over an image and averaged over the batch."""
    return ((out_S[:, :channels] - out_T[:, :channels]) ** 2).sum((1, 2, 3)).mean() / beta


def below_prior(seen, n):
    """An encoder's Gaussians with n rows before them that say nothing (an infinite std; at the top, the prior itself):
    the decoder then takes both in one batch, and its BatchNorm keeps the statistics of both."""
    rows = []
    for i, (mean, std) in enumerate(seen):
        blank = torch.zeros_like(mean[:1]).expand(n, -1, -1, -1)
        rows.append((torch.cat([blank, mean]), torch.cat([blank + (1 if i == len(seen) - 1 else math.inf), std])))
    return rows


class Losses(torch.nn.Module):
    """The student and its losses, a dict of numbers, in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, x):
        if not distilling:                                                     # the negative ELBO, in nats per image
            nll, kl = self.net.elbo(x, self.net.noise(len(x)), beta)
            return {'nll': nll.mean(), 'kl': sum(kl).mean()}
        n = micro_batch if net_T.config['class'] == 'LVAE' else 0              # rows from the prior, images below them
        if x is None:
            noise, seen, seen_T = net_T.noise(n), None, None
        else:
            with torch.no_grad():
                seen_T = below_prior(net_T.encode(x), n)
            seen = below_prior(self.net.encode(x), n)
            noise = [torch.randn_like(mean) for mean, _ in seen_T]
        with torch.no_grad():
            out_T, q_T, p_T = net_T.decode(noise, seen_T)
        out, q, p = self.net.decode(noise, seen)                               # both decoders, from the same noise
        p, p_T = ([(mean[:n], std[:n]) for mean, std in gaussians] for gaussians in (p, p_T))   # the prior's rows ...
        q, q_T = ([(mean[n:], std[n:]) for mean, std in gaussians] for gaussians in (q, q_T))   # ... and the images'
        terms = {}
        if n:
            terms['z'] = lam_z * sum(map(wasserstein, p, p_T))
            terms['out'] = output_kl(out[:n], out_T[:n])
        if x is not None:
            terms['z_x'] = lam_z * sum(map(wasserstein, q, q_T))
            terms['out_x'] = output_kl(out[n:], out_T[n:])
        return terms


# ---- check everything before any work starts ----
for wrong, message in [
        (method == 'prior' and data != '',
         f"method='prior' needs no images, --data={data} is for 'synthetic' and 'data'"),
        (method != 'prior' and not data, f"method={method!r} needs images: --data=mnist, an .npz or a folder"
         + ("; python synthesize.py config/synth_mnist_vae.py makes some" if method == 'synthetic' else ''))]:
    if wrong:
        M.die(message)
device, autocast, rank, world = M.start(device, dtype, seed)
micro_batch = M.share(batch_size, world)                                       # images of one forward pass
distilling = method != 'data'


def build_vae(config, teacher):
    """A VAE of random weights from its config, whose keys must be those of the teacher's. Raises ValueError."""
    kind, odd = teacher['class'], sorted(set(config) - set(teacher) - {'width', '_class_name'})
    if config.get('_class_name', kind) != kind or config['class'] != kind:
        raise ValueError(f"a student of class {config.get('_class_name', config['class'])} and a teacher of class "
                         f'{kind}: they must be the same')
    if odd or ('width' in config and kind != 'LVAE'):
        takes = ['width'] if kind == 'LVAE' else sorted(set(teacher) - {'class', 'in_channels', 'out_channels'})
        raise ValueError(f"student_config: {kind} has no {(odd or ['width'])[0]!r}, but {', '.join(takes)}")
    kw = {k: v for k, v in config.items() if k not in ('class', '_class_name')}
    if kind == 'LVAE':
        return M.make('LVAE', **kw)
    import diffusers
    with M.explained(f'student_config makes no {kind}'):
        return M.Autoencoder(getattr(diffusers, kind).from_config(kw))


try:
    net_T, images = None, None
    if distilling:
        net_T = M.load_vae(teacher)
        settings['teacher_digest'] = M.digest(net_T)
        net_T = M.cast_frozen(net_T.to(device, memory_format=M.memory_format(device)), M.pick_dtype(device, dtype))
        if method == 'prior' and net_T.config['class'] != 'LVAE':
            raise ValueError(f"{teacher} is an {net_T.config['class']}, whose prior makes no images: "
                             '--method=synthetic')
    if method != 'prior':
        images, _ = M.load_images(data)
        fits = device.type != 'cuda' or images.numel() < torch.cuda.mem_get_info(device)[0] / 2
        images = images.to(device if fits else 'cpu')                          # uint8
    channels = images.shape[1] if net_T is None else net_T.config['in_channels']
    base = {'class': 'LVAE', 'image_size': images.shape[-1], 'in_channels': channels} if net_T is None else net_T.config
    net = build_vae(base | student_config, base).to(device, memory_format=M.memory_format(device))
    both = [n for n in (net_T, net) if n]
    # what the levels look like tells whether the two fit each other, and the images
    if images is None:
        shapes = [n.sides for n in both]
    else:
        with autocast, torch.no_grad():
            x = images[:1].to(device).float() / 255
            seen = [n.eval().encode(x) for n in both]
            shapes = [[tuple(mean.shape[1:]) for mean, _ in s] for s in seen]
            made = net.decode([mean for mean, _ in seen[-1]], seen[-1])[0].shape[2:]
            if made != x.shape[2:]:
                raise ValueError(f'images of {tuple(x.shape[2:])} come back as {tuple(made)}: sides that can be halved '
                                 'as often as the VAE does')
    if shapes[0] != shapes[-1] or net.config['in_channels'] != channels:
        raise ValueError(f'the levels of the teacher are {shapes[0]}, of the student {shapes[-1]}: image_size, '
                         'in_channels and the latents must be the same')
    checkpoint = M.resume(settings, rank, net)
except (ValueError, RuntimeError, TypeError) as e:
    M.die(f'{e}; get {teacher_source}' if teacher_source and not os.path.exists(teacher) else str(e))

if method == 'prior':                                                          # the encoder stays as it is
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith('d'))
opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr, weight_decay=weight_decay, fused=True)
torch.manual_seed(seed * 1000 + rank + 1)                                      # from here on every rank has its luck


model = torch.compile(Losses(), dynamic=False) if compile else Losses()
if world > 1:
    # no BatchNorm of a network in training reads the statistics that it keeps, and only those of rank 0 are saved
    model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


# ---- results on disk ----
@torch.no_grad()
@autocast
def save_result():
    """The student, and pictures of it below the teacher's: from the same noise at every level, of the same images."""
    net.eval()
    path = os.path.join(out_dir, 'student')                                    # a file of ours, a folder of diffusers
    if net.config['class'] == 'LVAE':
        M.save_model(net, path + '.safetensors')
    else:
        net.net.save_pretrained(path)
    g, n = torch.Generator(device).manual_seed(seed), 36
    if net.config['class'] == 'LVAE':
        noise = net.noise(n, g)
        M.save_grid(f'{out_dir}/samples.png', [v.generate(noise)[0][:, :channels] * 2 - 1 for v in both], 12)
    if images is not None:
        picked = torch.randperm(len(images), generator=g, device=device)[:n]
        x = images[picked.to(images.device)].to(device).float() / 255
        made = [x]
        for v in both:
            seen = v.encode(x)
            made.append(v.decode([torch.zeros_like(mean) for mean, _ in seen], seen)[0][:, :channels])
        M.save_grid(f'{out_dir}/reconstructions.png', [x * 2 - 1 for x in made], 12)
    net.train()


# ---- the loop ----
step, sums, count = 0, 0., 0                                                   # on the device: no wait between two rows
if checkpoint:
    shared, own = M.go_on(checkpoint, opt)
    step, sums, count = shared['step'], torch.as_tensor(own['sums'], device=device), own['count']
if rank == 0:
    def millions(n): return f"{n.config['class']}, {sum(p.numel() for p in n.parameters()) / 1e6:.3f} M parameters"
    if distilling:
        print(f'teacher {teacher}: {millions(net_T)}')
    print(f'student: {millions(net)}; {method}, {max_steps:,} steps of {batch_size} images on {world} x {device.type}')
    log = M.Log(os.path.join(out_dir, 'log.csv'), step)
stop = M.stop_flag()
net.train()
t0, first, leaving = time.time(), step, 0
bar = tqdm(total=max_steps, initial=step, disable=rank > 0, mininterval=1)
while step < max_steps:
    opt.param_groups[0]['lr'] = lr * 0.5 * (1 + math.cos(math.pi * step / max_steps)) if lr_decay else lr
    x = None
    if images is not None:
        idx = torch.randint(len(images), (micro_batch,), device=images.device)
        x = images[idx].to(device, non_blocking=True).float() / 255
        if flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
    with autocast:
        terms = model(x)
    if not distilling and kl_warmup:
        terms['kl'] = terms['kl'] * min(1., (step + 1) / kl_warmup)
    sum(terms.values()).backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or float('inf'))
    opt.found_inf = (~norm.isfinite()).float()                                 # the fused step then changes nothing
    opt.step()
    opt.zero_grad(set_to_none=True)
    sums, count = sums + torch.stack([*terms.values(), norm]).detach(), count + 1
    step += 1
    bar.update()
    leaving = (world == 1 or step % 5 == 0) and M.largest(sum(stop[:1]))
    saving = step % save_every == 0 or step == max_steps or leaving
    if step % log_every == 0 or saving:                                        # also: BatchNorm has no found_inf
        *means, norm = (sums / count).tolist()
        if not math.isfinite(norm):                                            # the same on all ranks
            bar.close()
            M.die(f'step {step}: the loss or its gradient was not finite in the last {count} steps; nothing of that '
                  'reached the weights. Try a smaller --lr, or --grad_clip')
    if step % log_every == 0 or step == max_steps:
        if rank == 0:
            bar.set_postfix(loss=f'{sum(means):.4g}')
            log(step=step, loss=sum(means), **dict(zip(terms, means)), grad_norm=norm,
                images_per_s=(step - first) * batch_size / (time.time() - t0), seconds=time.time() - t0)
        sums, count = 0., 0
    if saving:
        M.save_checkpoint(settings, step, net, opt, {}, {'sums': sums, 'count': count}, rank)
        if rank == 0:
            save_result()                                                      # last: who stops us may not wait
    if leaving:
        break
bar.close()
if rank == 0:
    if step == first:                                                          # killed between checkpoint and result
        save_result()
    path = os.path.join(out_dir, 'student') + ('.safetensors' if net.config['class'] == 'LVAE' else '')
    print(f'step {step} of {max_steps}, {time.time() - t0:.0f} s; student: {path}, pictures: {out_dir}/*.png')
    if net.config['class'] == 'LVAE':
        print(f'evaluate: python eval_fid.py --models={path}' + (f',{teacher}' if distilling else ''))
M.leave(leaving)
