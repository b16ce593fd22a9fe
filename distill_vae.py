"""
Distils a hierarchical VAE into a smaller one, without the data it was trained on: both decoders are
fed the same noise at every level, and the student learns the Gaussians and the pixels that the
teacher computes from it. On synthetic images its encoder learns too. A GAN's generator, or any
other network that turns noise into images, is distilled in the same way. With `method='data'` it
trains a VAE on images, which is how teachers are made.

    python distill_vae.py  # the bundled MNIST teacher, minutes on a laptop
    python distill_vae.py config/mnist_lvae.py  # the bundled teacher itself, by the ELBO
    # with its encoder, on synthetic images
    python synthesize.py config/synth_mnist_vae.py
    python distill_vae.py --method=synthetic --data=out/synth_vae
    # any generator (docs/reference.md)
    python distill_vae.py --teacher=my_gan.py --student=my_small_gan.py
    torchrun --nproc_per_node=8 distill_vae.py config/vae_cifar10.py
    python distill_vae.py --teacher=stabilityai/sd-vae-ft-mse --method=synthetic --data=folder/ \\
        --student_config="{'block_out_channels': (32, 64, 128, 128)}"
    # a small decoder for previews, like TAESD
    python distill_vae.py config/vae_tiny_sd.py --data=folder/

adapters/plain_vae.py is a VAE of another kind, with the commands that train and distil it.
"""
import os

# teacher
teacher = 'pretrained/mnist_lvae.safetensors'  # an LVAE of ours; AutoencoderKL or AutoencoderTiny:
                             # a folder or hub id; or a Python file with load(): any generator, a
                             # GAN's too
# student
student = ''                 # '' is of the teacher's class; a Python file with build(); or the
                             # config.json of an AutoencoderKL or AutoencoderTiny of diffusers
student_config = {'width': 8}  # changes to the teacher's config, which is of the same class; for
                             # 'data', the config of an LVAE; for a Python file, arguments of its
                             # build()
# distillation
method = 'prior'             # 'prior' (noise only), 'synthetic' (also images, of any origin),
                             # 'data' (the ELBO, without a teacher). The last two need a network
                             # with an encoder
beta = 0.1                   # the pixels' variance is beta / 2
lam_z = 0.1                  # weight of the distance between the Gaussians of both networks
features = ''                # a classifier (models.load_classifier), in whose maps images are
lam_features = 100.0         # compared too, with this weight
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
init_from = 'scratch'        # 'scratch'; 'resume'; or 'overwrite' begins anew where an unfinished
                             # run lies
log_every = 20               # steps between rows of log.csv
save_every = 600             # steps between checkpoints (with pictures)
seed = 0
device = 'auto'              # 'auto', 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16',
                             # 'float32'
compile = False              # torch.compile, for GPUs
graph = True                 # on one GPU: the whole step as one CUDA graph
_ranges = {                  # allowed values of string settings
    'method': ('prior', 'synthetic', 'data'), 'init_from': ('scratch', 'resume', 'overwrite'),
    'dtype': ('auto', 'bfloat16', 'float32')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import inspect
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


def feature_distance(net_F, images, images_T):
    """The squared distance of images (B, C, H, W) in [0, 1] in the maps of a classifier, whose
    vectors at each position have length 1 (Zhang et al. 2018, Eq. (1), without its weights)."""
    total = 0.0
    maps, maps_T = (
        M.forward_features(net_F, M.preprocess(net_F, x * 2 - 1))[1] for x in (images, images_T)
    )
    for f, f_T in zip(maps, maps_T):
        f, f_T = (torch.nn.functional.normalize(m.float(), dim=1) for m in (f, f_T))
        total = total + ((f - f_T) ** 2).sum(1).mean()
    return total


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


def distill_losses(
    student, teacher, channels, n=0, x=None, beta=0.1, lam_z=0.1, net_F=None, lam_features=0.0
):
    """The loss terms, a dict of scalars, of n images from the prior ('z' and 'out') and of the
    images x (B, C, H, W) in [0, 1], if given ('z_x' and 'out_x'); of all in the features of net_F,
    if given. channels: the number of channels of `out` that are the mean of the pixels.
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
    theirs = x is not None and getattr(student, 'decodes_theirs', False)
    out, q, p = decode(student, noise, seen_T if theirs else seen)  # from the same noise
    q = seen if theirs else q
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
    if net_F is not None:
        terms['features'] = lam_features * feature_distance(net_F, mean, mean_T)
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
    odd = config.keys() - teacher.keys()
    if odd or config['class'] != teacher['class']:
        raise M.UserError(
            f"student_config: {teacher['class']} has no {min(odd, default='class')!r}; it has "
            f"{', '.join(k for k in teacher if k not in ('class', 'adapter'))}"
        )
    return M.make(config)


def build_generator(path, config, image_size, in_channels):
    """The network that build(**config) in a user's file returns. build() also gets `image_size` and
    `in_channels` if it has such parameters."""
    build = getattr(M.run_file(path), 'build', None)
    takes = inspect.signature(build).parameters if build else {}
    if config == {'width': 8} and 'width' not in takes:  # the default, which is for an LVAE
        config = {}
    size = {'image_size': image_size, 'in_channels': in_channels}
    return M.build_from_file(path, **config | {k: v for k, v in size.items() if k in takes})


def check_image_range(net, spec):
    """Raises UserError if the images of a user's generator do not lie in its `image_range`."""
    low, high = getattr(net, 'image_range', (0, 1))
    slack = (high - low) / 4  # an output without bounds exceeds its range a little
    with torch.no_grad():
        images = net.decode(net.noise(16))
    images = images if torch.is_tensor(images) else images[0]
    outside = (images < low - slack) | (images > high + slack)
    if outside.float().mean() > 0.05:
        raise M.UserError(
            f'{spec}: the images have values from {images.min():.2f} to {images.max():.2f}, but '
            f'the image_range of the network is {low, high}'
        )


def shapes_of(net, noise, images):
    """The shapes that teacher and student must share: of their latents for `images` (B, C, H, W) in
    [0, 1], or of all that they decode from noise."""
    if images is not None:
        return [mean.shape[1:] for mean, _ in net.eval().encode(images)]
    out, _, p = decode(net.eval(), noise)
    return [out.shape] + [mean.shape for mean, _ in p]


# ==== set-up ====
if __name__ == '__main__':
    settings = {k: globals()[k] for k in _defaults}
    M.check(max_steps > 0, f'max_steps={max_steps} must be above 0')
    M.check(beta > 0 and batch_size > 0, 'beta and batch_size must be above 0')
    M.check(
        method != 'prior' or data == '',
        f"method='prior' reads no images: --data={data} is for 'synthetic' and 'data'"
    )
    M.check(
        method == 'prior' or data,
        f"method={method!r} needs images: --data=mnist, an .npz or a folder; "
        'python synthesize.py config/synth_mnist_vae.py makes some'
    )
    dev, autocast, rank, world = M.init_distributed(device, dtype, seed)
    micro_batch = M.per_rank(batch_size, world)  # images of one forward pass
    compute_dtype = M.pick_dtype(dev, dtype)
    distilling = method != 'data'

    # ---- teacher, images ----
    net_T = images = None
    if distilling:
        net_T = M.load_vae(teacher)
        if M.split_file(teacher) == (teacher, ''):
            check_image_range(net_T, teacher)
        settings['teacher_digest'] = M.digest(net_T)
        net_T = M.cast_frozen(net_T.to(dev, memory_format=M.memory_format(dev)), compute_dtype)
    if method != 'prior':
        images, _ = M.load_images(data, channels=getattr(net_T, 'in_channels', 0))
        images = M.on_device(images, dev)  # uint8
        channels, side = images.shape[1], images.shape[-1]
    else:
        with torch.no_grad(), autocast:
            made = decode(net_T, net_T.noise(2, torch.Generator(dev)))[0]
        channels, side = getattr(net_T, 'in_channels', made.shape[1]), made.shape[-1]

    # ---- student ----
    if student.endswith('.json'):
        changes = {k: v for k, v in student_config.items() if k != 'width'}  # that is an LVAE's
        net = M.adapter('hub').build_vae(student, changes, net_T)
    elif student:
        net = build_generator(student, student_config, side, channels)
    elif net_T is None:
        whole = {'class': 'LVAE', 'image_size': side, 'in_channels': channels}
        whole['width'] = 128
        net = build_vae(whole | student_config, whole)
    else:
        foreign = M.split_file(teacher)[0]
        M.check(not foreign, f'{teacher} needs a student: --student=FILE.py with build()')
        net = build_vae(net_T.config | student_config, net_T.config)
    net_F = M.load_classifier(features).to(dev) if features else None
    wanted = getattr(net, 'image_size', 0)
    if images is not None and wanted:
        size = tuple(images.shape[2:])
        M.check(size == (wanted, wanted), f'{data} has images of {size}, the VAE is for {wanted}')
    net = net.to(dev, memory_format=M.memory_format(dev))
    both = [n for n in (net_T, net) if n is not None]
    needs = {'prior': [], 'synthetic': ['encode'], 'data': ['encode', 'elbo']}[method]
    for n in both:
        for name in needs:
            M.check(
                hasattr(n, name),
                f'{type(n).__name__} has no {name}(), which method={method!r} needs; a generator '
                "without an encoder can be distilled from noise: --method=prior"
            )
    with autocast, torch.no_grad():
        x = None if images is None else images[:2].to(dev).float() / 255
        noise = both[0].noise(2) if x is None else None
        shapes = [shapes_of(n, noise, x) for n in both]
    M.check(
        shapes[0] == shapes[-1],
        f'the teacher has the levels {shapes[0]}, the student {shapes[-1]}: image_size, '
        'in_channels and the latents must be the same'
    )
    if x is not None:
        with autocast, torch.no_grad():
            seen = net.encode(x)
            made = net.decode([torch.zeros_like(mean) for mean, _ in seen], seen)[0]
        M.check(
            made.shape[2:] == x.shape[2:],
            f'{data}: the VAE turns images of {tuple(x.shape[2:])} into {tuple(made.shape[2:])}: '
            'use images whose size its downsampling divides'
        )
    checkpoint = M.resume(settings, rank, net)
    if method == 'prior' and type(net).__name__ == 'LVAE':  # its encoder is not trained
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith('d'))
    graph_on = graph and dev.type == 'cuda' and world == 1
    if images is not None and images.device != dev:  # drawn by the host
        graph_on = False
    opt = torch.optim.Adam(
        [p for p in net.parameters() if p.requires_grad], lr, weight_decay=weight_decay, fused=True
    )
    torch.manual_seed(seed * 1000 + rank + 1)  # from here on each rank draws its own random numbers

    # ---- the step ----
    def loss_of(net, x):
        if not distilling:  # the negative ELBO, in nats per image
            nll, kl = net.elbo(x, net.noise(len(x)), beta)
            return {'nll': nll.mean(), 'kl': sum(kl).mean()}
        # n rows from the prior, then the images
        n = micro_batch if x is None or getattr(net_T, 'has_prior', True) else 0
        return distill_losses(net, net_T, channels, n, x, beta, lam_z, net_F, lam_features)

    model = Losses(net, loss_of)
    if compile:
        model = torch.compile(model, dynamic=False)
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=bool(student)
        )
    kl_weight = torch.ones((), device=dev)  # grows in the first steps of 'data'

    def one_step():
        """All that a step does on the device: a CUDA graph, where there is a GPU."""
        x = None
        if images is not None:
            idx = torch.randint(len(images), (micro_batch,), device=images.device)
            x = images[idx].to(dev, non_blocking=True).float() / 255
            if flip:
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=dev) < 0.5, x.flip(-1), x)
        with autocast:
            terms = model(x)
        if not distilling:
            terms['kl'] = terms['kl'] * kl_weight
        sum(terms.values()).backward()
        terms = {name: value.detach() for name, value in terms.items()}
        return terms | {'grad_norm': M.optimizer_step(net, opt, grad_clip)}

    # ---- results on disk ----
    path = os.path.join(out_dir, 'student')  # a file of ours, or a folder of diffusers
    of_diffusers = hasattr(net, 'save_pretrained')
    if not of_diffusers:
        path += '.safetensors'

    def save_student():
        if of_diffusers:
            net.save_pretrained(path)
        else:
            M.save_model(net, path)

    def save_checkpoint():
        own = {'sums': meter.sums}
        M.save_checkpoint(settings, step, net, opt, {}, own, rank, step in (0, max_steps))

    @torch.no_grad()
    @autocast
    def pictures():
        """Writes samples.png from the same noise, and reconstructions.png of the same images, the
        teacher's rows above the student's."""
        net.eval()
        g = torch.Generator(dev).manual_seed(seed)
        low, high = getattr(both[0], 'image_range', (0, 1))  # the range of decode()'s images

        def shown(out):
            return (out[:, :channels] - low) / (high - low) * 2 - 1

        if getattr(net, 'has_prior', True):
            noise = both[0].noise(36, g)
            M.save_grid(f'{out_dir}/samples.png', [shown(decode(n, noise)[0]) for n in both], 12)
        if images is not None:
            picked = torch.randperm(len(images), generator=g, device=dev)[:36]
            x = images[picked.to(images.device)].to(dev).float() / 255
            made = [x]
            for n in both:
                seen = n.encode(x)
                made.append(n.decode([torch.zeros_like(mean) for mean, _ in seen], seen)[0])
            M.save_grid(f'{out_dir}/reconstructions.png', [shown(out) for out in made], 12)

    # ---- where a run begins, or goes on ----
    step = 0
    meter = M.Meter(dev)
    if checkpoint:
        shared, own = M.restore(checkpoint, opt)
        step = shared['step']
        meter = M.Meter(dev, own['sums'])
    else:
        M.set_aside(out_dir, rank)
        save_checkpoint()  # to resume from; another run may take its place
    if rank == 0:
        for role, n in (('teacher', net_T), ('student', net)):
            if n is not None:
                size = sum(p.numel() for p in n.parameters())
                print(f'{role}: {type(n).__name__}, {size / 1e6:.3f} M parameters')
        print(f'{method}, {max_steps:,} steps of {batch_size} images on {world} x {dev.type}')
        log = M.Log(os.path.join(out_dir, 'log.csv'), step)
    run_step = M.Graphed(one_step, dev, graph_on, opt)
    stop = M.StopFlag()
    net.train()
    begin = time.time()
    first, leaving = step, 0
    bar = tqdm(total=max_steps, initial=step, disable=rank > 0, mininterval=1)

    # ==== the loop ====
    while step < max_steps:
        M.set_learning_rate(opt, lr * M.learning_rate_factor(step, max_steps, 0, lr_decay))
        if kl_warmup:
            kl_weight.fill_(min(1.0, (step + 1) / kl_warmup))
        meter.add(run_step())
        step += 1
        bar.update()
        if world == 1 or step % 5 == 0:
            leaving = M.all_reduce_max(stop.signal)
        saving = step % save_every == 0 or step == max_steps or leaving
        logging = step % log_every == 0 or step == max_steps
        if logging or saving:
            means = meter.means(step, net, save_checkpoint, 'try a smaller --lr, or --grad_clip')
        if logging and rank == 0:
            norm = means.pop('grad_norm')
            total = sum(means.values())
            bar.set_postfix(loss=f'{total:.4g}')
            seconds = time.time() - begin
            log(
                step=step, loss=total, **means, grad_norm=norm,
                images_per_s=(step - first) * batch_size / seconds, seconds=log.seconds + seconds
            )
        if logging:
            meter.clear()
        if saving:
            save_checkpoint()
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
        if not of_diffusers:
            spec = f'{student}:{path}' if student else path
            print('evaluate: python ' + shlex.join(['eval_fid.py', f'--models={spec}']))
    M.finish(leaving)
