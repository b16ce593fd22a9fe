"""
Distils a hierarchical VAE into a smaller one, without the data it was trained on: both decoders are
fed the same noise at every level, and the student learns the Gaussians and the pixels that the
teacher computes from it. On synthetic images its encoder learns too. A GAN's generator, or any
other network that turns noise into images, is distilled in the same way. With `method='data'` it
trains a VAE on images, which is how teachers are made.

    python distill_vae.py  # the bundled MNIST teacher, minutes on a laptop
    python distill_vae.py config/mnist_lvae.py  # the bundled teacher itself, by the ELBO
    python synthesize.py config/synth_mnist_vae.py && python distill_vae.py --method=synthetic --data=out/synth_vae
    # any generator (docs/reference.md)
    python distill_vae.py --teacher=my_gan.py --student=my_small_gan.py
    torchrun --nproc_per_node=8 distill_vae.py config/vae_cifar10.py
    python distill_vae.py --teacher=stabilityai/sd-vae-ft-mse --method=synthetic --data=folder/ \\
        --student_config="{'block_out_channels': (32, 64, 128, 128)}"
"""
import os

# teacher
teacher = 'pretrained/mnist_lvae.safetensors'  # an LVAE of ours; AutoencoderKL or AutoencoderTiny:
                             # a folder or hub id; or a Python file with load(): any generator, a
                             # GAN's too
# student
student = ''                 # '' is of the teacher's class; or a Python file with build()
student_config = {'width': 8}  # changes to the teacher's config, which is of the same class; for
                             # 'data', the config of an LVAE
# distillation
method = 'prior'             # 'prior' (noise only), 'synthetic' (also images, of any origin),
                             # 'data' (the ELBO, without a teacher)
beta = 0.1                   # the pixels' variance is beta / 2
lam_z = 0.1                  # weight of the distance between the Gaussians of both networks
data = ''                    # 'synthetic' and 'data': an .npz, a folder, or a torchvision name
flip = False                 # random horizontal flips
kl_warmup = 500              # 'data': steps in which the weight of the KL grows from 0 to 1; 0 for
                             # none
# optimisation
max_steps = 1800
batch_size = 32              # over all ranks; the slides: 128
lr = 1e-2                    # the slides: 50 epochs, at a rate that they do not give
lr_decay = True              # cosine decay to 0 at max_steps
weight_decay = 1e-4          # Adam's L2 penalty, added to the gradient
grad_clip = 0.0              # largest norm of the gradient; 0 for none
# system
out_dir = 'out/vae'
init_from = 'scratch'        # 'scratch' or 'resume'
log_every = 20               # steps between rows of log.csv
save_every = 600             # steps between checkpoints (with pictures)
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16',
                             # 'float32'
compile = False              # torch.compile, for GPUs
_ranges = {                  # allowed values of string settings
    'method': ('prior', 'synthetic', 'data'), 'init_from': ('scratch', 'resume'),
    'dtype': ('auto', 'bfloat16', 'float32')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import math
import shlex
import time

import torch
from tqdm import tqdm

import models as M


# ==== the method ====
#   noise ~ N(0, 1) at every level of the ladder
#   out_T, p_T = teacher.decode(noise);                               out, p = student.decode(noise)
#   L = KL(N(out_T, beta / 2) || N(out, beta / 2)) + lam_z sum over levels of W2^2(p_T, p)
# On images x, the same losses with the posteriors in place of the priors: q_T from
# teacher.encode(x), q from student.encode(x).
def wasserstein(a, b):
    """Squared 2-Wasserstein distance of diagonal Gaussians (mean, std), averaged over all
    entries."""
    return ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2).mean()


def output_kl(mean_S, mean_T, beta=0.1):
    """KL of two decoders' pixels (B, C, H, W), Gaussians of variance beta / 2, summed over an image
    and averaged over the batch."""
    return ((mean_S - mean_T) ** 2).sum((1, 2, 3)).mean() / beta


def decode(net, noise, seen=None):
    """(out, q, p) of a VAE's decoder (models.LVAE) or of another generator, which may return `out`
    alone: then q and p are empty."""
    made = net.decode(noise, seen) if seen else net.decode(noise)
    return (made.float(), [], []) if torch.is_tensor(made) else made


def below_prior(seen, n):
    """Puts n uninformative rows before an encoder's Gaussians: an infinite std, or at the top the
    prior itself. One decoder batch then holds samples of the prior and of the posterior, and
    BatchNorm's statistics cover both."""
    rows = []
    for i, (mean, std) in enumerate(seen):
        blank = torch.zeros_like(mean[:1]).expand(n, -1, -1, -1)
        blank_std = blank + (1 if i == len(seen) - 1 else math.inf)
        rows.append((torch.cat([blank, mean]), torch.cat([blank_std, std])))
    return rows


def rows_of(gaussians, part):
    """The rows `part`, a slice, of a list of Gaussians (mean, std)."""
    return [(mean[part], std[part]) for mean, std in gaussians]


def distill_losses(student, teacher, channels, n=0, x=None, beta=0.1, lam_z=0.1):
    """The loss terms, a dict of scalars, of n images from the prior ('z' and 'out') and of the
    images x (B, C, H, W) in [0, 1], if given ('z_x' and 'out_x'). channels: the number of channels
    of `out` that are the mean of the pixels.
    """
    seen = seen_T = None
    if x is None:
        noise = teacher.noise(n)
    else:
        with torch.no_grad():
            seen_T = below_prior(teacher.encode(x), n)
        seen = below_prior(student.encode(x), n)
        noise = [torch.randn_like(mean) for mean, _ in seen_T]
    with torch.no_grad():
        out_T, q_T, p_T = decode(teacher, noise, seen_T)
    out, q, p = decode(student, noise, seen)  # both decoders, from the same noise
    mean, mean_T = out[:, :channels], out_T[:, :channels]
    prior, posterior = slice(n), slice(n, None)
    p, p_T = rows_of(p, prior), rows_of(p_T, prior)
    q, q_T = rows_of(q, posterior), rows_of(q_T, posterior)
    terms = {}
    if n:
        if p:
            terms['z'] = lam_z * sum(map(wasserstein, p, p_T))
        terms['out'] = output_kl(mean[:n], mean_T[:n], beta)
    if x is not None:
        terms['z_x'] = lam_z * sum(map(wasserstein, q, q_T))
        terms['out_x'] = output_kl(mean[n:], mean_T[n:], beta)
    return terms


class Losses(torch.nn.Module):
    """The student and its losses as one module, because DistributedDataParallel hooks into
    forward(); loss_of(net, x) -> terms."""

    def __init__(self, net, loss_of):
        super().__init__()
        self.net = net
        self.loss_of = loss_of

    def forward(self, x):
        return self.loss_of(self.net, x)


def build_vae(config, teacher):
    """A VAE with random weights from `config`, which is the teacher's config with changes. Raises
    UserError for another class or an unknown key."""
    kind = teacher['class']
    odd = config.keys() - teacher.keys()
    if odd or config['class'] != kind:
        raise M.UserError(
            f"student_config: {kind} has no {min(odd, default='class')!r}; it has "
            f"{', '.join(k for k in teacher if k != 'class')}"
        )
    if kind == 'LVAE':
        return M.make(config)
    import diffusers

    return M.Autoencoder(
        getattr(diffusers, kind).from_config({k: v for k, v in config.items() if k != 'class'})
    )


# ==== set-up ====
if __name__ == '__main__':
    settings = {k: globals()[k] for k in _defaults}
    for wrong, message in [
        (
            method == 'prior' and data != '',
            f"method='prior' reads no images: --data={data} is for 'synthetic' and 'data'",
        ),
        (
            method != 'prior' and not data,
            f"method={method!r} needs images: --data=mnist, an .npz or a folder; "
            'python synthesize.py config/synth_mnist_vae.py makes some',
        ),
        (beta <= 0 or batch_size < 1, 'beta and batch_size must be above 0'),
    ]:
        if wrong:
            raise M.UserError(message)
    device, autocast, rank, world = M.init_distributed(device, dtype, seed)
    micro_batch = M.per_rank(batch_size, world)  # images of one forward pass
    compute_dtype = M.pick_dtype(device, dtype)
    distilling = method != 'data'
    foreign = M.split_file(teacher)[0] or student
    if foreign and method != 'prior':
        raise M.UserError(
            "a generator from a Python file can only be distilled from noise: method='prior', not "
            f"{method!r}"
        )

    # ---- teacher, images ----
    net_T = images = None
    if distilling:
        net_T = M.load_vae(teacher)
        settings['teacher_digest'] = M.digest(net_T)
        net_T = M.cast_frozen(
            net_T.to(device, memory_format=M.memory_format(device)), compute_dtype
        )
        if isinstance(net_T, M.Autoencoder) and method == 'prior':
            raise M.UserError(
                f'{teacher}: a {type(net_T.net).__name__} makes no images from its prior: use '
                '--method=synthetic'
            )
    if method != 'prior':
        images, _ = M.load_images(data, channels=net_T.in_channels if net_T else 0)
        fits = device.type != 'cuda' or images.numel() < torch.cuda.mem_get_info(device)[0] / 2
        images = images.to(device if fits else 'cpu')  # uint8
    if net_T is None:
        channels = images.shape[1]
    elif hasattr(net_T, 'in_channels'):
        channels = net_T.in_channels
    else:
        with torch.no_grad(), autocast:
            channels = decode(net_T, net_T.noise(2))[0].shape[1]

    # ---- student ----
    if student:
        net = M.build_from_file(student)
    elif foreign:
        raise M.UserError(f'{teacher} needs a student: --student=FILE.py with build()')
    else:
        base = (
            {'class': 'LVAE', 'image_size': images.shape[-1], 'in_channels': channels, 'width': 128}
            if net_T is None
            else net_T.config
        )
        net = build_vae(base | student_config, base)
    net = net.to(device, memory_format=M.memory_format(device))
    both = [n for n in (net_T, net) if n is not None]
    with autocast, torch.no_grad():  # check that the levels of both have the same shapes
        if images is not None:
            x = images[:2].to(device).float() / 255
            levels = [[mean.shape[1:] for mean, _ in n.eval().encode(x)] for n in both]
        else:
            levels = [n.eval().decode(both[0].noise(2)) for n in both]
            levels = [
                (
                    made.shape
                    if torch.is_tensor(made)
                    else [v.shape for v in (made[0], *sum(made[2], ()))]
                )
                for made in levels
            ]
    if levels[0] != levels[-1]:
        raise M.UserError(
            f'the teacher has the levels {levels[0]}, the student {levels[-1]}: image_size, '
            'in_channels and the latents must be the same'
        )
    checkpoint = M.resume(settings, rank, net)
    if method == 'prior' and isinstance(net, M.LVAE):  # the encoder is not trained
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith('d'))
    trained = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.Adam(trained, lr, weight_decay=weight_decay, fused=True)
    torch.manual_seed(seed * 1000 + rank + 1)  # from here on each rank draws its own random numbers

    def loss_of(net, x):
        if not distilling:  # the negative ELBO, in nats per image
            nll, kl = net.elbo(x, net.noise(len(x)), beta)
            return {'nll': nll.mean(), 'kl': sum(kl).mean()}
        # n rows from the prior, then the images
        n = 0 if isinstance(net_T, M.Autoencoder) else micro_batch
        return distill_losses(net, net_T, channels, n, x, beta, lam_z)

    model = Losses(net, loss_of)
    if compile:
        model = torch.compile(model, dynamic=False)
    if world > 1:
        # BatchNorm's running statistics are not used in training, and only those of rank 0 are
        # saved
        model = torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    # ---- results on disk ----
    path = os.path.join(out_dir, 'student')  # a file of ours, or a folder of diffusers
    if not isinstance(net, M.Autoencoder):
        path += '.safetensors'

    def save_student():
        if isinstance(net, M.Autoencoder):
            net.net.save_pretrained(path)
        else:
            M.save_model(net, path)

    @torch.no_grad()
    @autocast
    def pictures():
        """Writes samples.png from the same noise, and reconstructions.png of the same images, the
        teacher's rows above the student's."""
        net.eval()
        g = torch.Generator(device).manual_seed(seed)
        low, high = getattr(both[0], 'image_range', (0, 1))  # the range of decode()'s images

        def shown(out):
            return (out[:, :channels] - low) / (high - low) * 2 - 1

        if not isinstance(net, M.Autoencoder):
            noise = both[0].noise(36, g)
            M.save_grid(f'{out_dir}/samples.png', [shown(decode(n, noise)[0]) for n in both], 12)
        if images is not None:
            picked = torch.randperm(len(images), generator=g, device=device)[:36]
            x = images[picked.to(images.device)].to(device).float() / 255
            made = [x]
            for n in both:
                seen = n.encode(x)
                made.append(n.decode([torch.zeros_like(mean) for mean, _ in seen], seen)[0])
            M.save_grid(f'{out_dir}/reconstructions.png', [shown(out) for out in made], 12)

    # ==== the loop ====
    step, sums, count = 0, {}, 0  # tensors on the device: no wait for the GPU between rows
    if checkpoint:
        shared, own = M.restore(checkpoint, opt)
        step, count = shared['step'], own['count']
        sums = {k: v.to(device) for k, v in own['sums'].items()}
    if rank == 0:
        for role, n in (('teacher', net_T), ('student', net)):
            if n is not None:
                size = sum(p.numel() for p in n.parameters())
                print(f'{role}: {type(n).__name__}, {size / 1e6:.3f} M parameters')
        print(f'{method}, {max_steps:,} steps of {batch_size} images on {world} x {device.type}')
        log = M.Log(os.path.join(out_dir, 'log.csv'), step)
    stop = M.StopFlag()
    net.train()
    begin, first, leaving = time.time(), step, 0
    bar = tqdm(total=max_steps, initial=step, disable=rank > 0, mininterval=1)
    while step < max_steps:
        if lr_decay:
            opt.param_groups[0]['lr'] = lr * 0.5 * (1 + math.cos(math.pi * step / max_steps))
        x = None
        if images is not None:
            idx = torch.randint(len(images), (micro_batch,), device=images.device)
            x = images[idx].to(device, non_blocking=True).float() / 255
            if flip:
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
        with autocast:
            terms = model(x)
        if not distilling and kl_warmup:
            terms['kl'] = terms['kl'] * min(1.0, (step + 1) / kl_warmup)
        sum(terms.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or float('inf'))
        opt.found_inf = (~norm.isfinite()).float()  # if 1, the fused optimiser skips the step
        opt.step()
        opt.zero_grad(set_to_none=True)
        for name, value in (terms | {'grad_norm': norm}).items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        count += 1
        step += 1
        bar.update()
        if world == 1 or step % 5 == 0:
            leaving = M.all_reduce_max(stop.signal)
        saving = step % save_every == 0 or step == max_steps or leaving
        logging = step % log_every == 0 or step == max_steps
        if logging or saving:  # also before saving: found_inf does not protect BatchNorm
            totals = torch.stack(list(sums.values())).tolist()  # the one wait
            means = {k: v / count for k, v in zip(sums, totals)}
            if not math.isfinite(means['grad_norm']):  # the same on all ranks
                bar.close()
                raise M.UserError(
                    f'step {step}: the gradient was not finite in one of the last {count} steps; '
                    'that step changed no weights. Try a smaller --lr, or --grad_clip'
                )
        if logging:
            if rank == 0:
                norm = means.pop('grad_norm')
                loss = sum(means.values())
                bar.set_postfix(loss=f'{loss:.4g}')
                seconds = time.time() - begin
                log(
                    step=step, loss=loss, **means, grad_norm=norm,
                    images_per_s=(step - first) * batch_size / seconds,
                    seconds=log.seconds + seconds
                )
            sums, count = {}, 0
        if saving:
            M.save_checkpoint(settings, step, net, opt, {}, {'sums': sums, 'count': count}, rank)
            if rank == 0:
                save_student()
                if not leaving:  # last: after SIGTERM there may be little time
                    with stop.interrupts():
                        pictures()
                net.train()
        if leaving:
            break
    bar.close()
    if rank == 0:
        if step == first:  # killed after the last checkpoint, before the result was saved
            save_student()
        print(
            f'step {step} of {max_steps}, {time.time() - begin:.0f} s; student: {path}, pictures: '
            f'{out_dir}/*.png'
        )
        if not isinstance(net, M.Autoencoder):
            spec = f'{student}:{path}' if student else path
            command = ['eval_fid.py', f'--models={spec}' + (f',{teacher}' if distilling else '')]
            if channels == 3:
                command += [
                    '--features=pretrained/cifar10_resnet.safetensors',
                    '--reference=pretrained/cifar10_stats.npz',
                ]
            print('evaluate: python ' + shlex.join(command))
    M.finish(leaving)
