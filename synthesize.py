"""
DiffDFKD, first stage: makes the training images for distilling a classifier, without the data it
was trained on. A diffusion prior makes images, and at every denoising step the classifier pulls
them towards what it was trained on: its BatchNorm statistics and its predictions (Qi et al. 2025,
arXiv 2504.00870). With a VAE as the teacher, they move towards what it reconstructs well.

    python synthesize.py  # MNIST digits from the bundled models, on a laptop
    python synthesize.py config/synth_sd15.py  # the paper's CIFAR-10, Stable Diffusion 1.5
    torchrun --nproc_per_node=8 synthesize.py config/synth_sd15.py
    # DM-KD, with the same prompts (Table I)
    python synthesize.py config/synth_sd15.py --eta=0 --lca=none
    python synthesize.py config/synth_mnist_deepinversion.py      # DeepInversion: no prior at all
    python synthesize.py config/synth_mnist_vae.py                # for a VAE, the bundled one

Then distil: python distill_classifier.py, or distill_vae.py --method=synthetic. A run that was
stopped continues where it was.

Memory: Stable Diffusion 1.5 at batch_size 16 in bfloat16 has 1.9 GB of weights. The gradient
through U-Net and decoder (--edit=paper) takes another 13.0 GB at its peak with grad_batch=4 (6.8
with 2, 3.7 with 1); the U-Net alone, unguided, takes 2.7 GB. These numbers are sums over the
tensors alive at every operation; they were not measured on a GPU.
"""
import os

# teacher
teacher = 'pretrained/mnist_resnet.safetensors'  # a classifier of ours, a state dict of a ResNet,
                             # WRN or VGG, torchvision:NAME, a Python file with load(), or vae:PATH
                             # (models.load_vae)
teacher_config = {}          # what a state dict does not record: image_size, mean, std
                             # (models.load_classifier)
student = ''                 # a student distilled earlier; L_adv, Eq. (8), needs one
# prior
prior = 'pretrained/mnist_unet.safetensors'  # a denoiser of ours, an original checkpoint, a
                             # diffusers folder or hub id, a Python file with load(); 'none' is
                             # DeepInversion
prior_config = {}            # what an original checkpoint does not record (models.load_denoiser)
guidance = 1.0               # scale s of classifier-free guidance, Eq. (3); 1 is none
prompt = 'a realistic photo' # text priors: a random subject and style are added to it
class_names = ''             # text priors, instead of the random subjects: 'cifar10', 'cifar100',
                             # 'faces' or a file of names, one per line
sampler = 'ddpm'             # 'ddpm' (ancestral), 'ddim', 'renoise' (Eq. (5) as printed)
ddim_eta = 0.0               # noise of 'ddim'; 1 has the variance of 'ddpm'
steps = 25                   # denoising steps; for DeepInversion, steps of Adam
# guidance by the teacher
alpha = 0.3                  # weight of L_bn, Eq. (6); with a VAE, weight of the KL of its
                             # posterior from its prior, in nats per pixel
beta = 1.0                   # weight of L_cls, Eq. (7); with a VAE, weight of the mean squared
                             # error of its reconstruction
gamma = 1.0                  # weight of L_adv, Eq. (8); unused without a student
tau = 4.0                    # temperature of Eq. (8)
edit = 'x0'                  # 'paper' is Eq. (10): z_t moves by eta grad_{z_t} L. 'x0': x_0 moves
                             # by eta b_t^2 times grad_{x_0} of its own loss: the step shrinks with
                             # the noise, and the denoiser needs no gradient. 'x_t': the same with
                             # grad_{x_t}, through the denoiser. 'noise', for a prior of
                             # few_steps.py: its noise moves, by `steps` of Adam at the rate `lr`
eta = 3.0                    # step size for the loss of one walk, whatever the batch_size; 0 is
                             # unguided. With 'paper', 1 is the step of the authors
reevaluate = False           # the denoiser is evaluated again after the edit and after an
                             # augmentation, as in the authors' code
bn_loss = 'l2'               # 'l2' (distance of means and of variances), 'kl' (of the Gaussians, as
                             # Eq. (6) names it)
lca = 'cutmix'               # augmentation, Eq. (11): 'cutmix', 'mixup', 'traditional' (flips and
                             # shifts) or 'none'
lca_every = 8                # steps between augmentations, and at least as many after the last one
# DeepInversion (Yin et al. 2020), prior = 'none': pixels, optimised by Adam
lr = 0.1                     # its step size, also that of edit='noise'
tv = 0.0                     # weight of the total variation: the mean squared difference of
                             # neighbouring pixels
l2 = 0.0                     # weight of the mean square of the pixels (in [-1, 1])
jitter = 2                   # the teacher sees them shifted by up to this many pixels
flip = False                 # ... and mirrored in half of the steps
# what is kept
num_images = 6000            # over all ranks, rounded up to whole batches: batch_size * keep
keep = 4                     # images kept per walk: its predicted x_0 at the last step and at
                             # earlier ones
keep_every = 2               # steps between them
image_size = 0               # side of the kept images; 0 is the teacher's image size
# system
out_dir = 'out/synth'
batch_size = 100             # walks at once, per rank: L_bn takes its statistics over these, and
                             # CutMix mixes them
grad_batch = 100             # walks at once in the decoder, and in the denoiser if the gradient
                             # goes through it
seed = 0
device = 'auto'              # 'auto', 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16',
                             # 'float32'
_ranges = {                  # allowed values of string settings
    'sampler': ('ddpm', 'ddim', 'renoise'), 'edit': ('paper', 'x0', 'x_t', 'noise'),
    'bn_loss': ('l2', 'kl'),
    'lca': ('cutmix', 'mixup', 'traditional', 'none'), 'dtype': ('auto', 'bfloat16', 'float32')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import contextlib
import json
import shlex
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import models as M

SUBJECTS = """
a dog, a cat, a horse, a cow, a bird in flight, a fish, a frog on a leaf, a deer, an elephant, a
butterfly, a lizard, a spider, a rabbit, a flower, a tree, a mushroom, a fruit on a table, a
meal on a plate, a mountain, a beach, a river, a forest, a field, a street, a bridge, a house, a
castle, a tower, a car, a truck, a bus, a train, an aeroplane, a ship, a bicycle, a motorcycle,
a chair, a lamp, a cup, a bottle, a clock, a book, a musical instrument, a tool, a toy, a shoe,
a machine, a portrait of a person""".strip().replace('\n', ' ').split(', ')
STYLES = """
in daylight, at sunset, at night, in fog, in snow, in the rain, close up, from afar, from above,
from below, against a plain background, in front of a busy background, with soft focus, in
bright colours, in muted colours, in black and white""".strip().replace('\n', ' ').split(', ')
NAMES = {
    'cifar10': 'airplane automobile bird cat deer dog frog horse ship truck',
    'cifar100': """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
        couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
        house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
        motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
        pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket
        rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
        sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
        turtle wardrobe whale willow_tree wolf woman worm""",
    'faces': "woman's_face man's_face",
}


# ==== the method ====
#   x_t ~ N(0, 1), labels y at random
#   for t from T-1 down:
#       out = prior(x_t, t), guided                                                          Eq. (3)
#       x_0 from out and x_t                                                                 Eq. (4)
#       L = alpha L_bn + beta L_cls + gamma L_adv of teacher(decode(x_0)), y            Eqs. (6)-(9)
#       x_0 and x_t <- one step down the gradient of L                                      Eq. (10)
#       with reevaluate=True: out and x_0 again, from the new x_t
#       every lca_every steps: boxes of x_t are exchanged between the walks                 Eq. (11)
#       x_t <- x_{t-1}, by the prior's denoising step        Eq. (2); with sampler='renoise' Eq. (5)
#   the last x_0s, decoded, and y are training images of the teacher's student
class BatchNormInputs:
    """Records the input of every BatchNorm2d and SyncBatchNorm of a network in each forward pass:
    `inputs`, {layer: (B, C, ...)}."""

    def __init__(self, net):
        self.inputs = {}
        kinds = torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm
        self.layers = [m for m in net.modules() if isinstance(m, kinds)]
        for layer in self.layers:
            layer.register_forward_pre_hook(self.note)

    def note(self, layer, args):
        self.inputs[layer] = args[0]


def bn_distance(inputs, kind='l2'):
    """L_bn, Eq. (6): the distance of a batch's statistics from the teacher's running ones, summed
    over layers. `inputs` is {layer: (B, C, ...)}. 'l2' takes the L2 distances of the means
    and of the variances, 'kl' the KL divergence of the Gaussians."""
    total = 0.0
    for layer, x in inputs.items():
        all_but_channels = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, all_but_channels, correction=0)
        if kind == 'l2':
            total = total + (mean - layer.running_mean).norm() + (var - layer.running_var).norm()
        else:
            expected = layer.running_var + layer.eps
            ratio = (var + layer.eps) / expected
            total = (
                total
                + 0.5
                * (ratio + (mean - layer.running_mean) ** 2 / expected - 1 - ratio.log()).sum()
            )
    return total


def inversion_loss(teacher, x, y, noted, weights, student=None, tau=4.0, bn_kind='l2'):
    """(L_inv, its terms), Eqs. (6)-(9): how much a batch x (B, C, H, W) of images in [-1, 1]
    differs from the teacher's training images of the classes y (B,).

    noted: the teacher's BatchNormInputs. weights: (alpha, beta, gamma). student: if given, the loss
    rewards images on which it disagrees with the teacher, Eq. (8). Each of the two sees the images
    as it was trained to (models.preprocess).
    """
    alpha, beta, gamma = weights
    logits = teacher(M.preprocess(teacher, x))
    terms = {'bn': bn_distance(noted.inputs, bn_kind) + torch.zeros((), device=x.device)}  # Eq. (6)
    terms['cls'] = F.cross_entropy(logits, y)  # Eq. (7)
    loss = alpha * terms['bn'] + beta * terms['cls']
    if student is not None:
        log_p = F.log_softmax(student(M.preprocess(student, x)) / tau, 1)
        # Eq. (8)
        terms['adv'] = -F.kl_div(
            log_p, F.log_softmax(logits / tau, 1), log_target=True, reduction='batchmean'
        )
        loss = loss + gamma * terms['adv']
    return loss, terms


def vae_inversion_loss(vae, x, weights):
    """(loss, its terms) of a batch x (B, C, H, W) in [0, 1] for a VAE as the teacher (the slides):
    the KL of its posterior from its prior in nats per pixel, and the mean squared error of its
    reconstruction."""
    alpha, beta, _ = weights
    seen = vae.encode(x)
    out, q, p = vae.decode([torch.zeros_like(mean) for mean, _ in seen], seen)
    terms = {'kl': torch.zeros((), device=x.device)}
    if alpha:  # AutoencoderTiny has no posterior
        terms['kl'] = sum(M.gaussian_kl(a, b).mean() for a, b in zip(q, p)) / x[0].numel()
    terms['mse'] = F.mse_loss(out[:, : x.shape[1]], x)
    return alpha * terms['kl'] + beta * terms['mse'], terms


def move(x_t, x0, out, grad, t, diffusion, edit, eta):
    """Moves (x_t, x_0, out) down the gradient of the loss; the new `out` implies the new x_0.

    grad: of the loss, which is a mean over the batch. `eta` is a step down the loss of one walk, so
    the gradient is multiplied by the batch size. edit = 'paper' is Eq. (10): x_t <- x_t - eta grad,
    the gradient with respect to x_t. Eq. (4) gives x_0 from the new x_t and the old eps. 'x0' and
    'x_t' are ours: as in classifier guidance, the step shrinks with the noise, so that the prior
    can repair artifacts. x_0 moves by `step` and x_t by a_t times `step`, which leaves eps
    unchanged.
    """
    a_t, b_t = (v.to(x_t) for v in diffusion.ab(t, x_t))
    C = x_t.shape[1]
    step = eta * len(x_t) * grad
    if edit == 'paper':
        x0 = diffusion.predict_x0(out, x_t, t, clip=False) - step / a_t
        x_t = x_t - step
    else:
        step = b_t**2 * step
        x0 = x0.detach() - step
        x_t = x_t - a_t * step
    if diffusion.clip:
        x0 = x0.clamp(-diffusion.clip, diffusion.clip)
    return (
        x_t,
        x0,
        torch.cat([diffusion.target(x0, x_t, t, diffusion.prediction), out[:, C:]], dim=1),
    )


def augment(x_t, out, other, r, kind='cutmix'):
    """Latent augmentation, Eq. (11), with four random numbers r (4, B, 1) per walk; `other` (B,)
    holds the index of the walk to mix with. `out` is augmented like x_t, so that the next step
    needs no further evaluation.

    'cutmix': a box of at most half the height and width is taken from the other walk.
    'mixup': a weighted mean of both. 'traditional': flips, and shifts by up to an eighth.
    """
    B, _, H, W = x_t.shape
    device = x_t.device
    if kind == 'traditional':
        index = []
        for n, u in zip((H, W), r):
            shift = ((2 * u - 1) * n / 8).round().long()
            index.append((torch.arange(n, device=device) + shift).clamp(0, n - 1))
        rows, cols = index
        cols = torch.where(r[2] < 0.5, cols.flip(1), cols)
        batch = torch.arange(B, device=device)[:, None, None]
        place = batch, slice(None), rows[:, :, None], cols[:, None]
        return x_t[place].permute(0, 3, 1, 2), out[place].permute(0, 3, 1, 2)
    if kind == 'mixup':
        mask = r[0].view(-1, 1, 1, 1) / 2
    else:
        inside = []  # rows and columns of the box
        for n, size, corner in zip((H, W), r[:2] / 2, r[2:]):
            at = torch.arange(n, device=device) / n
            low = corner * (1 - size)
            inside.append((at >= low) & (at < low + size))
        mask = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()
    return torch.lerp(x_t, x_t[other], mask), torch.lerp(out, out[other], mask)


def prior_step(x_t, out, t, s, noise, diffusion, sampler, ddim_eta=0.0):
    """From x_t to x_s with the prior's output: an ancestral step ('ddpm'), a DDIM step ('ddim'), or
    Eq. (5) as printed, which noises x_0 afresh ('renoise')."""
    if sampler == 'ddpm':
        return diffusion.ddpm_step(out, x_t, t, s, noise)
    if sampler == 'ddim':
        return diffusion.ddim_step(out, x_t, t, s, ddim_eta, noise)
    return diffusion.q_sample(diffusion.predict_x0(out, x_t, t), s, noise)


def in_slices(fn, n, *rows):
    """Applies fn to n walks at a time. If a gradient is needed, activations are recomputed in the
    backward pass instead of stored (gradient checkpointing)."""
    if n >= len(rows[0]):
        return fn(*rows)
    run = partial(checkpoint, fn, use_reentrant=False) if torch.is_grad_enabled() else fn
    return torch.cat([run(*part) for part in zip(*(r.split(n) for r in rows))])


def as_kept(images, channels, image_size):
    """Converts the prior's images to the form in which they are kept: clamped to [-1, 1], with the
    teacher's channels, resized to image_size."""
    # clamp alone would do, but its gradient at exactly -1 and 1, where many pixels of a clamped x_0
    # are, is 1 in older versions of torch and 0 in newer ones
    images = torch.where(images.abs() <= 1, images, images.clamp(-1, 1))
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return M.resize(images, image_size)


def synthesize(
    prior, diffusion, images_of, loss_of, draws, y, cond, times, kept_times,
    autocast=contextlib.nullcontext(), guiding=True, edit='x0', eta=3.0, reevaluate=False,
    lca='cutmix', lca_every=8, sampler='ddpm', ddim_eta=0.0, grad_batch=100
):
    """One batch of walks from noise: (kept images in [-1, 1], a list of (B, C, H, W); losses, a
    list of (t, terms)).

    prior(x_t, t, *cond): the guided output. images_of(x_0): decoded, as they are kept.
    loss_of(images, y): (loss, terms); None if unguided and not logged. draws: the noise of the
    start (B, C, H, W) and of every step, the partners and random numbers of the augmentation.
    times: the walk's timesteps, from noise to image; at kept_times the predicted x_0 is kept. The
    rest are settings.
    """
    x_t, noise, partners, numbers = draws

    def predict(x_t, t):
        with torch.no_grad(), autocast:
            return prior(x_t, t, *cond)  # Eq. (3)

    kept, rows = [], []
    wants_grad = guiding and edit != 'x0'  # through the denoiser
    for i, (t, s) in enumerate(zip(times, [*times[1:], -1])):
        tt = torch.full((len(x_t),), t, device=x_t.device)
        if wants_grad:
            x_t.requires_grad_()
            with autocast:
                out = in_slices(prior, grad_batch, x_t, tt, *cond)  # Eq. (3)
        else:
            out = predict(x_t, tt)
        x0 = diffusion.predict_x0(out, x_t, t)  # Eq. (4)

        if guiding:
            point = x_t if wants_grad else x0.requires_grad_()
            with autocast:
                images = in_slices(images_of, grad_batch, x0)
            loss, terms = loss_of(images, y)  # Eqs. (6)-(9)
            rows.append((t, {'loss': loss.detach()} | {k: v.detach() for k, v in terms.items()}))
            (grad,) = torch.autograd.grad(loss, point)
            # with edit='paper' Eq. (10)
            x_t, x0, out = move(x_t.detach(), x0, out.detach(), grad, t, diffusion, edit, eta)
            if reevaluate:
                out = predict(x_t, tt)
                x0 = diffusion.predict_x0(out, x_t, t)

        if t in kept_times:
            with torch.no_grad():
                with autocast:
                    kept.append(in_slices(images_of, grad_batch, x0))
                if not guiding and loss_of is not None:  # for the log only
                    loss, terms = loss_of(kept[-1], y)
                    rows.append((t, {'loss': loss} | terms))
        last = len(times) - 1
        # the prior needs lca_every more steps to repair the seams
        if lca != 'none' and (i + 1) % lca_every == 0 and last - i >= lca_every:
            x_t, out = augment(x_t, out, partners[i], numbers[i], lca)  # Eq. (11)
            if reevaluate:
                out = predict(x_t, tt)
        # with sampler='ddpm' Eq. (2), with 'renoise' Eq. (5)
        x_t = prior_step(x_t, out, t, s, noise[i], diffusion, sampler, ddim_eta)
    return kept, rows


def deep_inversion(
    noise, loss_of, y, times, kept_times, generator, lr=0.1, tv=0.0, l2=0.0, jitter=2, flip=False
):
    """DeepInversion (Yin et al. 2020), without a prior: Adam optimises the pixels, which start as
    noise (B, C, H, W). Returns the same as `synthesize`."""
    x = noise.clamp(-1, 1).requires_grad_()
    opt = torch.optim.Adam([x], lr)
    kept, rows = [], []
    for t in times:
        shift = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
        seen = x.flip(3) if flip and torch.rand((), generator=generator) < 0.5 else x
        loss, terms = loss_of(torch.roll(seen, shift, (2, 3)), y)
        rows.append((t, {'loss': loss.detach()} | {k: v.detach() for k, v in terms.items()}))
        variation = x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean()
        (x.grad,) = torch.autograd.grad(loss + tv * variation + l2 * x.square().mean(), x)
        opt.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        if t in kept_times:
            kept.append(x.detach().clone())
    return kept, rows


def move_noise(noise, draw, loss_of, y, times, kept_times, lr=0.1):
    """Moves the noise (B, C, H, W) from which a few-step prior draws images, draw(z), by a step of
    Adam for each of `times`: an image is one differentiable pass. The noise keeps its length, so
    that it stays noise that the prior knows. Returns the same as `synthesize`."""
    z = noise.clone().requires_grad_()
    length = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    opt = torch.optim.Adam([z], lr)
    kept, rows = [], []
    for t in times:
        images = draw(z)
        loss, terms = loss_of(images, y)
        rows.append((t, {'loss': loss.detach()} | {k: v.detach() for k, v in terms.items()}))
        if t in kept_times:
            kept.append(images.detach())
        (z.grad,) = torch.autograd.grad(loss, z)
        opt.step()
        with torch.no_grad():
            z.mul_(length / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    return kept, rows


def read_prompts(prompt, class_names):
    """(texts, names): `prompt` with every subject (the class names, or SUBJECTS) in every style;
    `names` are the class names, [] if class_names is ''."""
    names = []
    if class_names in NAMES:
        names = NAMES[class_names].split()
    elif class_names:
        names = M.read_lines(class_names)
    subjects = [f"a {name.replace('_', ' ')}" for name in names] or SUBJECTS
    texts = []
    for subject in subjects:
        texts += [f'{prompt} of {subject}, {style}' for style in STYLES]
    return texts, names


# ==== set-up ====
if __name__ == '__main__':
    config = {k: globals()[k] for k in _defaults}
    M.check(
        steps > (keep - 1) * keep_every,
        f'keep={keep} images, keep_every={keep_every} steps apart, need more than {steps} steps'
    )
    M.check(
        min(keep, keep_every, batch_size, lca_every, num_images, grad_batch) > 0,
        'keep, keep_every, lca_every, batch_size, grad_batch and num_images must be above 0'
    )
    M.check(
        prior != 'none' or class_names == '' and guidance == 1 and not prior_config,
        'class_names, guidance and prior_config need a prior, but --prior=none has none'
    )
    M.check(
        prior == 'none' or lca not in ('cutmix', 'mixup') or batch_size > 1,
        f'batch_size=1: {lca} mixes two walks; use 2 or more, or --lca=none'
    )
    dev, autocast, rank, world = M.init_distributed(device, dtype, seed)
    compute_dtype = M.pick_dtype(dev, dtype)

    # ---- teacher ----
    vae = teacher.startswith('vae:')
    if vae and (student or teacher_config):
        raise M.UserError('student and teacher_config are for classifiers, not for a VAE')
    net_T = M.load_vae(teacher[4:]) if vae else M.load_classifier(teacher, **teacher_config)
    net_S = None
    if student:
        net_S = M.load_classifier(student, **teacher_config if M.is_plain(student) else {})
        if net_S.num_classes != net_T.num_classes:
            raise M.UserError(
                f'{student} has {net_S.num_classes} classes, the teacher {net_T.num_classes}'
            )
    digests = {
        'teacher_digest': M.digest(net_T),
        'student_digest': M.digest(net_S) if student else '',
    }
    net_T = net_T.to(dev)
    net_S = net_S.to(dev) if student else None
    num_classes = 1 if vae else net_T.num_classes
    channels = net_T.in_channels
    side_kept = image_size or net_T.image_size
    noted = BatchNormInputs(net_T)
    for layer in net_T.modules():
        untracked = layer in noted.layers and layer.running_mean is None
        M.check(
            alpha == 0 or vae or not untracked and 'FrozenBatchNorm' not in type(layer).__name__,
            f'{teacher}: its {type(layer).__name__} does not hold the statistics of its training '
            f'images, so L_bn is undefined (alpha={alpha}): use --alpha=0'
        )
    if alpha and not vae and not noted.layers:
        raise M.UserError(
            f'{teacher} has no BatchNorm, so L_bn is undefined (alpha={alpha}): use --alpha=0'
        )
    if alpha and vae and 'Tiny' in str(M.description(net_T).get('class')):
        raise M.UserError(
            f'{teacher} has no posterior, so it has no KL (alpha={alpha}): use --alpha=0'
        )

    # ---- prior ----
    net = diffusion = None
    text = False
    times = list(range(steps))[::-1]
    if prior != 'none':
        net, diffusion = M.load_denoiser(prior, compute_dtype, **prior_config)
        digests['prior_digest'] = M.digest(net)
        net = net.to(dev, memory_format=M.memory_format(dev))
        net = M.graph_network(net, dev)
        text = getattr(net, 'condition', '') == 'text'
        if edit != 'noise':
            spacing = 'trailing' if sampler == 'ddim' else 'even'
            times = M.sampling_steps(diffusion.T, steps, spacing)
        if edit == 'paper' and eta and diffusion.config['schedule'] == 'flow':
            raise M.UserError(
                f"edit='paper' divides by a_t, which is 0 at the start of a flow ({prior}): use "
                "--edit=x0"
            )
    if class_names and not text:
        raise M.UserError(f'class_names={class_names}: {prior} takes no text')
    if text:
        texts, names = read_prompts(prompt, class_names)
        if vae and names:
            num_classes = len(names)
        if names and len(names) != num_classes:
            raise M.UserError(
                f'class_names={class_names} has {len(names)} names, {teacher} {num_classes} classes'
            )
        net.set_prompts(texts)
        if names:
            digests['names'] = names
    if net is not None:
        M.check_guidance(net, prior, guidance)
    side = net.image_size if net else side_kept or 32
    shape = batch_size, net.in_channels if net else channels, side, side
    if not side_kept:  # the teacher takes any size: keep the size of the prior's images
        side_kept = M.decode(net, torch.zeros(1, *shape[1:], device=dev)).shape[-1]
    kept_times = times[-1 - (keep - 1) * keep_every :: keep_every]

    def denoise(x_t, t, y=None):
        return M.guided(net, x_t, t, y, guidance).float()  # Eq. (3)

    def images_of(z):
        return as_kept(M.decode(net, z), channels, side_kept)

    def loss_of(images, y):
        if vae:
            return vae_inversion_loss(net_T, (images + 1) / 2, (alpha, beta, gamma))
        weights = alpha, beta, gamma
        return inversion_loss(net_T, images, y, noted, weights, net_S, tau, bn_loss)

    def make_shard(shard):
        """(kept images, labels, losses) of batch_size walks. All random numbers are drawn on the
        CPU, so that they are the same for every device."""
        g = torch.Generator().manual_seed(seed * 1_000_000 + shard)
        x_t = torch.randn(shape, generator=g)
        if net is None:
            y = (shard * batch_size + torch.randperm(batch_size, generator=g)) % num_classes
            kept, rows = deep_inversion(
                x_t.to(dev), loss_of, y.to(dev), times, kept_times, g, lr, tv, l2, jitter,
                flip
            )
            return kept, y, rows
        noise = torch.randn(steps, *shape, generator=g)
        partners = torch.stack([torch.randperm(batch_size, generator=g) for _ in times])
        numbers = torch.rand(steps, 4, batch_size, 1, generator=g)
        y = (shard * batch_size + torch.randperm(batch_size, generator=g)) % num_classes
        cond = []
        if text and class_names:
            cond = [y * len(STYLES) + torch.randint(len(STYLES), (batch_size,), generator=g)]
        elif net.num_classes == num_classes:  # the prior's own classes
            cond = [y]
        elif net.num_classes:  # other classes, or prompts without class names: at random
            cond = [torch.randint(net.num_classes, (batch_size,), generator=g)]
        draws = [v.to(dev) for v in (x_t, noise, partners, numbers)]
        if edit == 'noise':
            passes = M.sampling_steps(diffusion.T, getattr(net, 'sampling', {}).get('steps', 1))

            def draw(z):
                for t, s in zip(passes, [*passes[1:], -1]):
                    tt = torch.full((len(z),), t, device=dev)
                    with autocast:
                        out = in_slices(denoise, grad_batch, z, tt, *[c.to(dev) for c in cond])
                    z = diffusion.ddim_step(out, z, tt, s)
                return in_slices(images_of, grad_batch, z)

            kept, rows = move_noise(draws[0], draw, loss_of, y.to(dev), times, kept_times, lr)
            return kept, y, rows
        guiding = eta > 0 and (alpha > 0 or beta > 0 or (gamma > 0 and net_S is not None))
        # the loss of unguided images can cost more than they do: that of four shards is enough
        logged = guiding or shard < 4 * world
        kept, rows = synthesize(
            denoise, diffusion, images_of, loss_of if logged else None, draws, y.to(dev),
            [c.to(dev) for c in cond], times, kept_times, autocast, guiding, edit, eta, reevaluate,
            lca, lca_every, sampler, ddim_eta, grad_batch
        )
        return kept, y, rows

    # ---- the shards to make; existing ones must have the same settings ----
    volatile = ('num_images', 'out_dir', 'device', 'grad_batch')
    settings = {k: v for k, v in config.items() if k not in volatile} | digests | {'world': world}
    settings = json.dumps(settings, sort_keys=True)
    shards = -(-num_images // (batch_size * keep))
    todo = []
    for shard in range(rank, shards, world):
        path = os.path.join(out_dir, f'images_{rank:04d}_{shard // world:05d}.npz')
        if not os.path.exists(path):
            todo.append((shard, path))
            continue
        with M.open_npz(path) as made:
            before, now = json.loads(str(made['settings'])), json.loads(settings)
        for k in before | now:
            if before.get(k) != now.get(k):
                raise M.UserError(
                    f"{path} was made with {k}={before.get(k)!r}, not {now.get(k)!r}: use another "
                    '--out_dir, or the settings of the first run'
                )
    M.check(
        not os.path.exists(os.path.join(out_dir, 'ckpt.pt')),
        f'{out_dir} holds a training run: use another --out_dir'
    )
    M.lock_out_dir(out_dir, rank)
    if rank == 0:
        log = M.Log(
            os.path.join(out_dir, 'log.csv'), todo[0][0] * steps if todo else shards * steps
        )
        n = shards * batch_size
        print(
            f'teacher {teacher}, prior {prior}; {n * keep:,} images of {side_kept}x{side_kept} '
            f'from {n:,} walks of {steps} steps, in {shards} shard(s) on {world} x {dev.type}'
        )
        if world == 1 and len(todo) < shards:
            print(f'{shards - len(todo)} of the shards were made before')

    # ==== the loop ====
    start = time.time()
    for shard, path in (bar := tqdm(todo, disable=rank > 0, unit='shard')):
        images, y, rows = make_shard(shard)
        if not torch.stack([x.isfinite().all() for x in images]).all():
            bar.close()
            raise M.UserError(
                f'the images of shard {shard} are not finite and are not saved: try a smaller '
                '--eta or --lr'
            )
        # .cpu() waits for the device
        images = torch.cat([M.to_uint8(x) for x in images]).permute(0, 2, 3, 1).cpu()
        if rank == 0 and rows:
            values = torch.stack([torch.stack(list(terms.values())) for _, terms in rows]).tolist()
            for (t, terms), v in zip(rows, values):
                log(step=shard * steps + times.index(t) + 1, t=t, **dict(zip(terms, v)))
        arrays = {
            'arr_0': images.numpy(),
            'settings': np.array(settings),
            't': np.repeat(kept_times, batch_size),
        }
        if not vae:
            arrays['arr_1'] = y.repeat(keep).numpy()
        if shard == 0:  # before the shard: after a kill, both are made again
            count = torch.bincount(y)
            classes = count.nonzero()[:20, 0]
            columns = min(10, count[classes].min().item())
            last = M.to_float(images[-batch_size:].permute(0, 3, 1, 2))
            rows = torch.cat([last[y == c][: 100 if vae else columns] for c in classes])
            M.save_grid(os.path.join(out_dir, 'preview.png'), [rows], columns)
        M.write_atomically(path, lambda tmp: np.savez_compressed(tmp, **arrays))
    M.all_reduce_max()  # all ranks are done
    if rank == 0:
        print(
            f'{out_dir}: {shards} shard(s), {time.time() - start:.0f} s; pictures: '
            f'{out_dir}/preview.png'
        )
        if vae:
            command = [
                'distill_vae.py',
                '--method=synthetic',
                f'--data={out_dir}',
                f'--teacher={teacher[4:]}',
            ]
        else:
            command = ['distill_classifier.py', f'--data={out_dir}', f'--teacher={teacher}']
            if teacher_config:
                command.append(f'--teacher_config={teacher_config}')
            if n * keep < 528:  # its defaults: a batch of 128, and 400 images to compare on
                command += [f'--holdout={n * keep // 4}', f'--batch_size={max(1, n * keep // 4)}']
            if not hasattr(net_T, 'forward_features') and not hasattr(net_T, 'stages'):
                command.append('--lam_msarc=0.0')
        print('distil: python ' + shlex.join(command))
    M.finish()
