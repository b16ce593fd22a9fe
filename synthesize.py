"""
DiffDFKD, first stage: makes the training images for distilling a classifier, without the data it was trained on. A
diffusion prior makes images, and at every denoising step the classifier pulls them towards what it was trained on: its
BatchNorm statistics and its predictions (Qi et al. 2025, arXiv 2504.00870). A VAE as the teacher pulls them towards
what it reconstructs well.

    python synthesize.py                                          # MNIST digits from the bundled models, on a laptop
    python synthesize.py config/synth_cifar10_sd15.py             # the paper's CIFAR-10, Stable Diffusion 1.5
    torchrun --nproc_per_node=8 synthesize.py config/synth_cifar10_sd15.py
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 synthesize.py ...
    python synthesize.py config/synth_cifar10_sd15.py --eta=0 --lca=none   # DM-KD, with the same prompts (Table I)
    python synthesize.py config/synth_mnist_deepinversion.py      # DeepInversion: no prior at all
    python synthesize.py config/synth_mnist_vae.py                # for a VAE, the bundled one

Then distil: python distill_classifier.py, or distill_vae.py --method=synthetic. A run that was stopped goes on where it
was.

Memory: Stable Diffusion 1.5 at batch_size 16 in bfloat16 has 1.9 GB of weights, and at the largest moment of
--edit=paper, the gradient through U-Net and decoder, 13.0 GB beside them with grad_batch=4 (6.8 with 2, 3.7 with 1);
the U-Net alone, unguided, 2.7 GB. Computed by adding up the tensors alive at every operation, not measured on a GPU.
"""
import os
import time

# teacher
teacher = 'pretrained/mnist_resnet.safetensors'  # a classifier of ours, a state dict of a ResNet, WRN or VGG,
                             # torchvision:NAME, or vae:PATH (models.load_vae)
teacher_source = ''          # where a missing teacher is to be had, for the message
teacher_config = {}          # what a state dict does not say: image_size, mean, std (models.load_classifier)
student = ''                 # a distilled student: from then on L_adv counts
# prior
prior = 'pretrained/mnist_unet.safetensors'  # a denoiser of ours, an original checkpoint, a diffusers folder or hub id;
                             # 'none' is DeepInversion
prior_config = {}            # what an original checkpoint does not say (models.load_denoiser)
guidance = 1.0               # scale s of classifier-free guidance, Eq. (3); 1 is none
prompt = 'a realistic photo' # text priors: followed by a random subject and style
class_names = ''             # text priors, instead of the random subjects: 'cifar10', 'cifar100', 'faces' or a file of
                             # names, one per line
sampler = 'ddpm'             # 'ddpm' (ancestral), 'ddim', 'renoise' (Eq. (5) as printed)
ddim_eta = 0.0               # noise of 'ddim'; 1 has the variance of 'ddpm'
steps = 25                   # denoising steps; of DeepInversion, steps of Adam
# guidance by the teacher
alpha = 0.3                  # weight of L_bn, Eq. (6); of a VAE's KL of posterior and prior, in nats per pixel
beta = 1.0                   # weight of L_cls, Eq. (7); of a VAE's mean squared error of the reconstruction
gamma = 1.0                  # weight of L_adv, Eq. (8); without a student there is none
tau = 4.0                    # temperature of Eq. (8)
edit = 'x0'                  # 'paper' is Eq. (10): z_t moves by eta grad_{z_t} L. 'x0': x_0 moves by eta b_t^2 times
                             # grad_{x_0} of its own loss, less and less as the noise goes, and the denoiser needs no
                             # gradient; 'x_t': the same with grad_{x_t}, through the denoiser
eta = 3.0                    # its step size; 0 is unguided. 'paper' has the batch's mean: 100 for 100 digits at once
bn_loss = 'l2'               # 'l2' (distance of means and of variances), 'kl' (of the Gaussians, as Eq. (6) names it)
lca = 'cutmix'               # augmentation, Eq. (11): 'cutmix', 'mixup', 'traditional' (flips and shifts) or 'none'
lca_every = 8                # steps between two of them, and after the last
# DeepInversion (Yin et al. 2020), prior = 'none': pixels, optimised by Adam
lr = 0.1                     # its step size
tv = 0.0                     # weight of the total variation: mean squared difference of neighbours, both ways
l2 = 0.0                     # weight of the mean square of the pixels, which are in [-1, 1]
jitter = 2                   # the teacher sees them shifted by up to so many pixels
flip = False                 # ... and flipped half of the time
# what is kept
num_images = 6000            # over all ranks
keep = 4                     # images kept of each walk: its predicted x_0 at the last so many steps ...
keep_every = 2               # ... that are so far apart
image_size = 0               # side of the kept images; 0 is what the teacher takes
# system
out_dir = 'out/synth'
batch_size = 100             # walks at once, per rank; they share the BatchNorm statistics and the CutMix
grad_batch = 100             # walks at once in the decoder, and in the denoiser where the gradient goes through it
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16', 'float32'
_ranges = {                  # what configurator.py does not know of itself
    'sampler': ('ddpm', 'ddim', 'renoise'), 'edit': ('paper', 'x0', 'x_t'), 'bn_loss': ('l2', 'kl'), 'ddim_eta': (0, 1),
    'lca': ('cutmix', 'mixup', 'traditional', 'none'), 'tau': (1e-30, 1e30), 'lr': (1e-30, 1e30), 'jitter': (0, 1000),
    'image_size': (0, 4096), 'steps': (1, 10 ** 6)}
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in _defaults}

import json
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import models as M

SUBJECTS = """a dog, a cat, a horse, a cow, a bird in flight, a fish, a frog on a leaf, a deer, an elephant, a
butterfly, a lizard, a spider, a rabbit, a flower, a tree, a mushroom, a fruit on a table, a meal on a plate, a
mountain, a beach, a river, a forest, a field, a street, a bridge, a house, a castle, a tower, a car, a truck, a bus, a
train, an aeroplane, a ship, a bicycle, a motorcycle, a chair, a lamp, a cup, a bottle, a clock, a book, a musical
instrument, a tool, a toy, a shoe, a machine, a portrait of a person""".replace('\n', ' ').split(', ')
STYLES = """in daylight, at sunset, at night, in fog, in snow, in the rain, close up, from afar, from above, from
below, against a plain background, in front of a busy background, with soft focus, in bright colours, in muted colours,
in black and white""".replace('\n', ' ').split(', ')
NAMES = {
    'cifar10': 'airplane automobile bird cat deer dog frog horse ship truck',
    'cifar100': """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
        camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
        dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
        lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
        pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
        shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
        television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""",
    'faces': "woman's_face man's_face"}

# ---- the method ----
#   x_t ~ N(0, 1), labels y at random
#   for t from T-1 down:
#       out = prior(x_t, t), guided                                                                Eqs. (2), (3)
#       x_0 from out and x_t                                                                       Eq. (4)
#       L = alpha L_bn + beta L_cls + gamma L_adv of teacher(decode(x_0)), y                       Eqs. (6)-(9)
#       x_0 and x_t <- moved down the gradient of L                                                Eq. (10)
#       every lca_every steps: boxes of x_t are exchanged between the walks                        Eq. (11)
#       x_t <- the prior's next                                                                    Eq. (5)
#   the last x_0s, decoded, and y are training images of the teacher's student
def bn_distance():
    """L_bn, Eq. (6): how far the batch's statistics are from those of the teacher's training, summed over layers."""
    total = torch.zeros((), device=device)
    for m, x in seen.items():
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        if bn_loss == 'l2':
            total += (mean - m.running_mean).norm() + (var - m.running_var).norm()
        else:                                                                  # KL of two Gaussians, per channel
            ratio = (var + m.eps) / (m.running_var + m.eps)
            total += 0.5 * (ratio + (mean - m.running_mean) ** 2 / (m.running_var + m.eps) - 1 - ratio.log()).sum()
    seen.clear()
    return total


def inversion_losses(images, y):
    """L_inv, Eq. (9), of a batch of images that are to have the labels y, and a dict of its terms: L_bn, L_cls and
    L_adv, Eqs. (6)-(8); of a VAE the KL of its posterior and the error of its reconstruction."""
    x = as_input(images)
    if vae:
        seen = net_T.encode(x)
        out, q, p = net_T.decode([torch.zeros_like(mean) for mean, _ in seen], seen)
        terms = {'kl': sum(M.gaussian_kl(a, b).mean() for a, b in zip(q, p)) / x[0].numel(),
                 'mse': F.mse_loss(out[:, :channels], x)}
        if not alpha:                                                          # AutoencoderTiny has no posterior
            terms['kl'] = torch.zeros((), device=device)
    else:
        logits = net_T(x)
        terms = {'bn': bn_distance(), 'cls': F.cross_entropy(logits, y)}
        if net_S:
            terms['adv'] = -F.kl_div(F.log_softmax(net_S(x) / tau, 1), F.log_softmax(logits / tau, 1), log_target=True,
                                     reduction='batchmean')
    loss = sum(weight * term for weight, term in zip((alpha, beta, gamma), terms.values()))
    return loss, {'loss': loss.detach()} | {k: v.detach() for k, v in terms.items()}


def denoise(x_t, t, y=None):
    return M.guided(net, x_t, t, y, guidance).float()                          # Eqs. (2), (3)


def augment(x_t, out, other, r):
    """Latent augmentation, Eq. (11), with four random numbers r (4, B, 1) a walk. CutMix: a box of every walk, at most
    half as high and wide, comes from another walk. The network's output is treated like x_t, so that the step that
    follows needs no further evaluation."""
    H, W = x_t.shape[2:]
    if lca == 'traditional':                                                   # by up to an eighth; mirrored or not
        rows, cols = ((torch.arange(n, device=device) + ((2 * u - 1) * n / 8).round().long()).clamp(0, n - 1)
                      for n, u in zip((H, W), r))
        cols = torch.where(r[2] < 0.5, cols.flip(1), cols)
        place = torch.arange(batch_size, device=device)[:, None, None], slice(None), rows[:, :, None], cols[:, None]
        return tuple(v[place].permute(0, 3, 1, 2) for v in (x_t, out))
    if lca == 'mixup':
        mask = r[0].view(-1, 1, 1, 1) / 2
    else:
        low = r[2:] * (1 - r[:2] / 2)                                          # corners and sizes: inside the image
        rows, cols = ((at >= a) & (at < a + size / 2) for at, a, size in
                      zip([torch.arange(n, device=device) / n for n in (H, W)], low, r))
        mask = (rows[:, None, :, None] & cols[:, None, None, :]).float()
    return torch.lerp(x_t, x_t[other], mask), torch.lerp(out, out[other], mask)


def synthesize(shard):
    """One shard: batch_size walks from noise. The kept images in [-1, 1], the labels, the losses as [(t, dict)]."""
    # all draws are made on the CPU, so that they are the same on every device, and sent there at once
    g = torch.Generator().manual_seed(seed * 1_000_000 + shard)
    x_t, noise = torch.randn(shape, generator=g).to(device), torch.randn(steps, *shape, generator=g).to(device)
    others = torch.stack([torch.randperm(batch_size, generator=g) for _ in times]).to(device)
    boxes = torch.rand(steps, 4, batch_size, 1, generator=g).to(device)
    y, cond = (shard * batch_size + torch.randperm(batch_size, generator=g)) % num_classes, []
    if text and class_names:
        cond = [y * len(STYLES) + torch.randint(len(STYLES), (batch_size,), generator=g)]
    elif net.num_classes:                                                      # the prior's own classes, or any prompt
        cond = [y if net.num_classes == num_classes else torch.randint(net.num_classes, (batch_size,), generator=g)]
    y, cond = y.to(device), [c.to(device) for c in cond]
    guiding = eta > 0 and (alpha > 0 or beta > 0 or (gamma > 0 and net_S is not None))
    kept, rows = [], []
    for i, (t, s) in enumerate(zip(times, [*times[1:], -1])):
        tt = torch.full((batch_size,), t, device=device)
        x_t.requires_grad_(guiding and edit != 'x0')
        with torch.set_grad_enabled(x_t.requires_grad), autocast:
            out = in_slices(denoise, x_t, tt, *cond) if x_t.requires_grad else denoise(x_t, tt, *cond)
        x0 = diffusion.predict_x0(out, x_t, t)                                 # Eq. (4)

        if guiding:
            point = x0.requires_grad_() if edit == 'x0' else x_t
            with autocast:
                images = in_slices(lambda z: as_kept(M.decode(net, z)), x0)
            loss, terms = inversion_losses(images, y)                          # Eqs. (6)-(9)
            rows.append((t, terms))
            grad, = torch.autograd.grad(loss, point)
            a_t, b_t = (v.to(x_t) for v in diffusion.ab(t, x_t))
            x_t, out = x_t.detach(), out.detach()
            if edit == 'paper':
                # the network is asked once, so Eq. (4) gives the x_0 of the new z_t with the eps of the old one
                x0 = diffusion.predict_x0(out, x_t, t, clip=False) - eta / a_t * grad
                x_t = x_t - eta * grad                                         # Eq. (10)
            else:
                # as in classifier guidance the step shrinks with the noise, so that the prior repairs what it breaks; a
                # move of x_0, and a_t times that of x_t, leave the predicted eps what it was
                move = eta * b_t ** 2 * batch_size * grad                      # batch_size: of each image's own loss
                x0, x_t = x0.detach() - move, x_t - a_t * move
            x0 = x0.clamp(-1, 1) if diffusion.clip else x0
            out = torch.cat([diffusion.target(x0, x_t, t, diffusion.prediction), out[:, shape[1]:]], dim=1)

        if t in kept_times:
            with torch.no_grad():
                with autocast:
                    kept.append(in_slices(lambda z: as_kept(M.decode(net, z)), x0))
                if not guiding:
                    rows.append((t, inversion_losses(kept[-1], y)[1]))
        if lca != 'none' and (i + 1) % lca_every == 0 and steps - 1 - i >= lca_every:   # time for repair is left
            x_t, out = augment(x_t, out, others[i], boxes[i])                  # Eq. (11)
        if sampler == 'ddpm':
            x_t = diffusion.ddpm_step(out, x_t, t, s, noise[i])                # in the place of Eq. (5): ancestral
        elif sampler == 'ddim':
            x_t = diffusion.ddim_step(out, x_t, t, s, ddim_eta, noise[i])
        else:
            x_t = diffusion.q_sample(diffusion.predict_x0(out, x_t, t), s, noise[i])   # Eq. (5)
    return kept, y, rows


def deep_inversion(shard):
    """The same without a prior: pixels that start as noise (Yin et al. 2020)."""
    g = torch.Generator().manual_seed(seed * 1_000_000 + shard)
    x = torch.randn(shape, generator=g).clamp(-1, 1).to(device).requires_grad_()
    y = ((shard * batch_size + torch.randperm(batch_size, generator=g)) % num_classes).to(device)
    opt = torch.optim.Adam([x], lr)
    kept, rows = [], []
    for i, t in enumerate(times):
        shift = torch.randint(-jitter, jitter + 1, (2,), generator=g).tolist()
        mirrored = x.flip(3) if flip and torch.rand((), generator=g) < 0.5 else x
        loss, terms = inversion_losses(torch.roll(mirrored, shift, (2, 3)), y)
        rows.append((t, terms))
        x.grad, = torch.autograd.grad(loss + tv * (x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean())
                                      + l2 * x.square().mean(), x)
        opt.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        if t in kept_times:
            kept.append(x.detach().clone())
    return kept, y, rows


def in_slices(fn, *rows):
    """fn of a few walks at a time; where a gradient is wanted, what it needs is made again instead of being kept."""
    if grad_batch >= batch_size:
        return fn(*rows)
    run = partial(checkpoint, fn, use_reentrant=False) if torch.is_grad_enabled() else fn
    return torch.cat([run(*part) for part in zip(*(r.split(grad_batch) for r in rows))])


def as_kept(images):
    """Images of the prior as they are kept: in [-1, 1], with the teacher's channels, image_size a side."""
    images = images.clamp(-1, 1)
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return M.resize(images, image_size)


def as_input(images):
    """Images of the prior as the teacher wants them."""
    return (as_kept(images) + 1) / 2 if vae else M.preprocess(net_T, as_kept(images))


# ---- check everything before any work starts ----
for wrong, message in [
        ((keep - 1) * keep_every >= steps,
         f'keep={keep} images, keep_every={keep_every} steps apart, need more than {steps} steps'),
        (prior == 'none' and (class_names != '' or guidance != 1 or prior_config),
         'class_names, guidance and prior_config are for a prior, --prior=none has none'),
        (prior != 'none' and lca in ('cutmix', 'mixup') and batch_size < 2,
         f'batch_size=1: {lca} mixes two walks; 2 or more, or --lca=none')]:
    if wrong:
        M.die(message)
device, autocast, rank, world = M.start(device, dtype, seed)

try:
    vae = teacher.startswith('vae:')
    net_T = M.load_vae(teacher[4:]) if vae else M.load_classifier(teacher, **teacher_config)
    net_S = M.load_classifier(student, **{} if M.class_in(student) else teacher_config) if student else None
    if vae and (student or teacher_config):
        raise ValueError(f'student={student} and teacher_config are for classifiers, there is no L_adv of a VAE')
    digests = {'teacher_digest': M.digest(net_T), 'student_digest': M.digest(net_S) if student else ''}
    net_T, net_S = net_T.to(device), net_S.to(device) if student else None
    num_classes, channels = net_T.config.get('num_classes', 1), net_T.config.get('in_channels', 3)
    image_size = image_size or net_T.config.get('image_size', 0)
    norms = [] if vae else [m for m in net_T.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if alpha and net_T.config['class'] == 'AutoencoderTiny':
        raise ValueError(f'{teacher} has no posterior, so alpha={alpha} has nothing to weigh: --alpha=0')
    if alpha and not norms and not vae:
        raise ValueError(f'{teacher} has no BatchNorm, so alpha={alpha} has nothing to compare: --alpha=0')
    if student and net_S.config['num_classes'] != num_classes:
        raise ValueError(f"{student} has {net_S.config['num_classes']} classes, the teacher {num_classes}")
    net, diffusion, text, times = None, None, False, list(range(steps))[::-1]
    if prior != 'none':
        net, diffusion = M.load_denoiser(prior, M.pick_dtype(device, dtype), **prior_config)
        net = net.to(device, memory_format=M.memory_format(device))
        text = getattr(net, 'condition', '') == 'text'
        times = M.sampling_steps(diffusion.T, steps, 'trailing' if sampler == 'ddim' else 'even')
        if guidance != 1 and not (text or net.num_classes):
            raise ValueError(f'guidance={guidance}: {prior} has no condition to be guided to')
    if class_names and not text:
        raise ValueError(f'class_names={class_names}: {prior} takes no text')
    if text:
        names = NAMES[class_names].split() if class_names in NAMES else []
        if class_names and not names:
            names = M.read_lines(class_names, f"class_names={class_names}: {', '.join(NAMES)}, or a file of names")
        num_classes = len(names) if vae and names else num_classes
        if class_names and len(names) != num_classes:
            raise ValueError(f'class_names={class_names} has {len(names)} names, {teacher} {num_classes} classes')
        subjects = [f"a {n.replace('_', ' ')}" for n in names] or SUBJECTS
        net.set_prompts([f'{prompt} of {subject}, {style}' for subject in subjects for style in STYLES])
    side = net.config['image_size'] if net else image_size or 32
    shape = batch_size, net.config['in_channels'] if net else channels, side, side
    if 4 * steps * math.prod(shape) > M.free_memory(device):
        raise ValueError(f'batch_size={batch_size}: the noise of {steps} steps does not fit into memory')

    with torch.no_grad(), M.explained(f'{teacher} cannot take the images of {prior} at its image_size='
                                      f"{net_T.config.get('image_size')} (teacher_config has one)"):
        x = M.decode(net, torch.zeros(1, *shape[1:], device=device))
        image_size = image_size or x.shape[-1]
        x = as_input(x)
        net_T.encode(x) if vae else net_T(x)
    kept_times, shards = times[-1 - (keep - 1) * keep_every::keep_every], -(-num_images // (batch_size * keep))
    volatile = 'num_images', 'out_dir', 'device', 'grad_batch'
    settings = json.dumps({k: v for k, v in config.items() if k not in volatile}
                          | digests | {'world': world}, sort_keys=True)
    M.check_folder(out_dir)
    todo = []
    for shard in range(rank, shards, world):
        path = os.path.join(out_dir, f'images_{rank:04d}_{shard // world:05d}.npz')
        if not os.path.exists(path):
            todo.append((shard, path))
        elif str(M.read_npz(path).get('settings')) != settings:
            raise ValueError(f'{path} was made with other settings: another --out_dir, or those of the first run')
except (ValueError, RuntimeError, TypeError) as e:
    missing = teacher_source and not os.path.exists(teacher.removeprefix('vae:'))
    M.die(f'{e}; get {teacher_source}' if missing else str(e))

# the input of every BatchNorm of the teacher, noted as it passes
seen = {}
for m in norms:
    m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0]))

# ---- the loop ----
M.claim(out_dir, rank)
log = M.Log(os.path.join(out_dir, 'log.csv'), todo[0][0] * steps if todo else shards * steps) if rank == 0 else None
if rank == 0:
    print(f'teacher {teacher}, prior {prior}; {shards * batch_size * keep:,} images of {image_size}x{image_size} from '
          f'{shards * batch_size:,} walks of {steps} steps, in {shards} shards on {world} x {device.type}'
          + (f', {shards - len(todo)} of them made before' if world == 1 and len(todo) < shards else ''))
t0 = time.time()
for shard, path in (bar := tqdm(todo, disable=rank > 0, unit='shard')):
    images, y, rows = (synthesize if net else deep_inversion)(shard)
    if not torch.stack([x.isfinite().all() for x in images]).all():
        bar.close()
        M.die(f'the images of shard {shard} are not finite and are not kept: a smaller --eta, or --lr')
    images = torch.cat([M.to_uint8(x) for x in images]).permute(0, 2, 3, 1).cpu()  # here the host waits
    values, y = torch.stack([torch.stack(list(terms.values())) for _, terms in rows]).tolist(), y.cpu()
    for (t, terms), v in zip(rows, values if log else []):
        log(step=shard * steps + times.index(t) + 1, t=t, **dict(zip(terms, v)))
    arrays = {'arr_0': images.numpy(), 'settings': np.array(settings)}
    if not vae:
        arrays['arr_1'] = y.repeat(keep).numpy()
    arrays['t'] = np.repeat(kept_times, batch_size)
    if shard == 0:                                                             # first: a kill leaves both to be made
        count = torch.bincount(y)
        classes = count.nonzero()[:20, 0]
        columns = min(10, count[classes].min().item())
        last = M.to_float(images[-batch_size:].permute(0, 3, 1, 2))
        rows = torch.cat([last[y == c][:100 if vae else columns] for c in classes])
        M.save_grid(os.path.join(out_dir, 'preview.png'), [rows], columns)
    M.write_atomically(path, lambda tmp: np.savez_compressed(tmp, **arrays))
M.largest()                                                                    # all are done
if rank == 0:
    print(f'{out_dir}: {shards} shards, {time.time() - t0:.0f} s; pictures: {out_dir}/preview.png')
    print('distil: python ' + (f'distill_vae.py --method=synthetic --data={out_dir} --teacher={teacher[4:]}' if vae else
                               f'distill_classifier.py --data={out_dir} --teacher={teacher}'))
M.leave()
