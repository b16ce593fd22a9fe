"""
DiffDFKD, first stage: makes the training images for distilling a classifier, without the data it was trained on. A
diffusion prior makes images, and at every denoising step the classifier pulls them towards what it was trained on: its
BatchNorm statistics and its predictions (Qi et al. 2025, arXiv 2504.00870). A VAE as the teacher pulls them towards what it
reconstructs well.

    python synthesize.py                                               # MNIST digits from the bundled models, on a laptop
    python synthesize.py config/synth_cifar10_sd15.py                  # the paper's CIFAR-10 setting, Stable Diffusion 1.5
    torchrun --nproc_per_node=8 synthesize.py config/synth_cifar10_sd15.py
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 synthesize.py ...
    python synthesize.py config/synth_cifar10_sd15.py --class_names=cifar10 --alpha=0 --beta=0      # DM-KD
    python synthesize.py config/synth_mnist_vae.py                     # for a VAE, the bundled one

Then distil: python distill_classifier.py, or distill_vae.py --method=synthetic. A run that was stopped goes on where it was.

Memory: Stable Diffusion 1.5 at batch_size 16 in half precision needs 1.8 GB for weights and, with decode_batch=1, 3.0 GB
for the largest moment, the gradient through the decoder (the U-Net with guidance: 2.5 GB); 47 GB with all 16 decoded at
once. Computed by adding up the tensors alive at every operation, not measured on a GPU.
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
prior = 'pretrained/mnist_unet.safetensors'  # a denoiser of ours, an original checkpoint, a diffusers folder or hub id
prior_config = {}            # what an original checkpoint does not say (models.load_denoiser)
guidance = 1.0               # scale s of classifier-free guidance, Eq. (3); 1 is none
prompt = 'a realistic photo' # text priors: followed by a random subject and style
class_names = ''             # text priors: 'cifar10', 'cifar100', 'domainnet10', 'faces' or a file of names, one per line,
                             # instead of the random subjects
sampler = 'ddpm'             # 'ddpm' or 'ddim'
steps = 25                   # denoising steps
# guidance by the teacher
alpha = 0.3                  # weight of L_bn, Eq. (6); of a VAE's KL of posterior and prior, in nats per pixel
beta = 1.0                   # weight of L_cls, Eq. (7); of a VAE's mean squared error of the reconstruction
gamma = 1.0                  # weight of L_adv, Eq. (8); without a student there is none
tau = 4.0                    # temperature of Eq. (8)
eta = 3.0                    # step size of Eq. (10), for the gradient of one image's loss
bn_loss = 'l2'               # 'l2' (distance of means and of variances), 'kl' (of the Gaussians, as Eq. (6) names it)
grad_through_prior = False   # the gradient of Eq. (10) goes through the denoiser too
lca = 'cutmix'               # latent augmentation, Eq. (11): 'cutmix', 'mixup' or 'none'
lca_every = 8                # steps between two of them, and after the last
# what is kept
num_images = 6000            # over all ranks
keep = 4                     # images kept of each walk: its predicted x_0 at the last so many steps ...
keep_every = 2               # ... that are so far apart
image_size = 0               # side of the kept images; 0 is what the teacher takes
# system
out_dir = 'out/synth'
batch_size = 100             # walks at once, per rank; they share the BatchNorm statistics and the CutMix
decode_batch = 1             # latents decoded at once where the gradient is wanted
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 on GPUs that have it), 'bfloat16', 'float32'
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: v for k, v in globals().items() if not k.startswith('_') and isinstance(v, (bool, int, float, str, tuple, dict))}

import json
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import models as M

SUBJECTS = """a dog, a cat, a horse, a cow, a bird in flight, a fish, a frog on a leaf, a deer, an elephant, a butterfly, a lizard,
a spider, a rabbit, a flower, a tree, a mushroom, a fruit on a table, a meal on a plate, a mountain, a beach, a river, a forest,
a field, a street, a bridge, a house, a castle, a tower, a car, a truck, a bus, a train, an aeroplane, a ship, a bicycle,
a motorcycle, a chair, a lamp, a cup, a bottle, a clock, a book, a musical instrument, a tool, a toy, a shoe, a machine,
a portrait of a person""".replace('\n', ' ').split(', ')
STYLES = """in daylight, at sunset, at night, in fog, in snow, in the rain, close up, from afar, from above, from below, against
a plain background, in front of a busy background, with soft focus, in bright colours, in muted colours,
in black and white""".replace('\n', ' ').split(', ')
NAMES = {
    'cifar10': 'airplane automobile bird cat deer dog frog horse ship truck',
    'cifar100': """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
        flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
        motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
        poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
        squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
        wardrobe whale willow_tree wolf woman worm""",
    'faces': "woman's_face man's_face",
    'domainnet10': 'aircraft_carrier airplane alarm_clock ambulance angel animal_migration ant anvil apple arm'}

# ---- check everything before any work starts ----
for wrong, message in [
        (bn_loss not in ('l2', 'kl'), f"bn_loss={bn_loss!r}: 'l2' or 'kl'"),
        (lca not in ('cutmix', 'mixup', 'none'), f"lca={lca!r}: 'cutmix', 'mixup' or 'none'"),
        (sampler not in ('ddpm', 'ddim'), f"sampler={sampler!r}: 'ddpm' or 'ddim'"),
        (min(num_images, keep, keep_every, lca_every, batch_size, decode_batch, steps) < 1,
         'num_images, steps, keep, keep_every, lca_every, batch_size and decode_batch: at least 1'),
        ((keep - 1) * keep_every >= steps, f'keep={keep} images, keep_every={keep_every} steps apart, need more than {steps} steps'),
        (min(alpha, beta, gamma, eta, image_size) < 0 or tau <= 0, 'alpha, beta, gamma, eta and image_size: 0 or more; tau: above 0'),
        (lca != 'none' and batch_size < 2, "batch_size=1: latent augmentation mixes two walks; 2 or more, or --lca=none")]:
    if wrong:
        M.die(message)
device, autocast, rank, world = M.start(device, dtype, seed)


def resize(images):
    """Images of the prior as they are kept."""
    if image_size in (0, images.shape[-1]):
        return images
    return F.interpolate(images, size=(image_size, image_size), mode='bilinear', antialias=True, align_corners=False)


def as_input(images):
    """Images of the prior, (B, C, H, W) in [-1, 1], as the teacher wants them: its channels, size and normalisation."""
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return (resize(images).clamp(-1, 1) + 1) / 2 if vae else M.preprocess(net_T, images)


try:
    vae = teacher.startswith('vae:')
    net_T = (M.load_vae(teacher[4:]) if vae else M.load_classifier(teacher, **teacher_config)).to(device)
    net_S = M.load_classifier(student, **teacher_config).to(device) if student else None
    if vae and student:
        raise ValueError(f'student={student} is for classifiers, there is no L_adv of a VAE')
    num_classes, channels = net_T.config.get('num_classes', 1), net_T.config.get('in_channels', 3)
    image_size = image_size or net_T.config.get('image_size', 0)
    norms = [] if vae else [m for m in net_T.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if alpha and net_T.config['class'] == 'AutoencoderTiny':
        raise ValueError(f'{teacher} has no posterior, so alpha={alpha} has nothing to weigh: --alpha=0')
    if alpha and not norms and not vae:
        raise ValueError(f'{teacher} has no BatchNorm, so alpha={alpha} has nothing to compare: --alpha=0')
    if student and net_S.config['num_classes'] != num_classes:
        raise ValueError(f"{student} has {net_S.config['num_classes']} classes, the teacher {num_classes}")
    net, diffusion = M.load_denoiser(prior, **prior_config)
    net = net.to(device, memory_format=M.memory_format(device))
    text = getattr(net, 'condition', '') == 'text'
    if class_names and not text:
        raise ValueError(f'class_names={class_names}: {prior} takes no text')
    if text:
        names = NAMES[class_names].split() if class_names in NAMES else []
        if class_names and not names:
            names = M.read_lines(class_names, f"class_names={class_names}: {', '.join(NAMES)}, or a file with a name per line")
        num_classes = len(names) if vae and names else num_classes
        if class_names and len(names) != num_classes:
            raise ValueError(f'class_names={class_names} has {len(names)} names, {teacher} {num_classes} classes')
        subjects = [f"a {n.replace('_', ' ')}" for n in names] or SUBJECTS
        net.set_prompts([f'{prompt} of {subject}, {style}' for subject in subjects for style in STYLES])
    if guidance != 1 and not net.num_classes:
        raise ValueError(f'guidance={guidance}: {prior} has no condition to be guided to')
    times = M.sampling_steps(diffusion.T, steps, 'even' if sampler == 'ddpm' else 'trailing')
    shape = batch_size, net.config['in_channels'], net.config['image_size'], net.config['image_size']

    with torch.no_grad():
        try:
            x = as_input(M.decode(net, torch.zeros(1, *shape[1:], device=device)))
            net_T.encode(x) if vae else net_T(x)
        except RuntimeError as e:
            raise ValueError(f"{teacher} cannot take the images of {prior} at its image_size={net_T.config['image_size']} "
                             f'(teacher_config has an image_size): {M.first_line(e)}') from None
    image_size = image_size or x.shape[-1]
    shards = -(-num_images // (batch_size * keep))
    settings = json.dumps({k: v for k, v in config.items() if k not in ('num_images', 'out_dir', 'device', 'decode_batch')}
                          | {'world': world}, sort_keys=True)
    todo = []
    for shard in range(rank, shards, world):
        path = os.path.join(out_dir, f'images_{rank:04d}_{shard // world:05d}.npz')
        if not os.path.exists(path):
            todo.append((shard, path))
        elif str(M.read_npz(path).get('settings')) != settings:
            raise ValueError(f'{path} was made with other settings: another --out_dir, or the settings of the first run')
except ValueError as e:
    M.die(f'{e}; get {teacher_source}' if teacher_source and not os.path.exists(teacher.removeprefix('vae:')) else str(e))

# the input of every BatchNorm of the teacher, noted as it passes
seen = {}
for m in norms:
    m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0]))


def bn_distance():
    """L_bn, Eq. (6): how far the batch's statistics are from those of the teacher's training, summed over layers."""
    total = 0.
    for m, x in seen.items():
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        if bn_loss == 'l2':
            total += (mean - m.running_mean).norm() + (var - m.running_var).norm()
        else:                                                                  # KL of two Gaussians, per channel
            ratio = (var + m.eps) / (m.running_var + m.eps)
            total += 0.5 * (ratio + (mean - m.running_mean) ** 2 / (m.running_var + m.eps) - 1 - ratio.log()).sum()
    seen.clear()
    return torch.as_tensor(total)


def inversion_losses(images, y):
    """L_bn, L_cls and L_adv, Eqs. (6)-(8), of a batch of images in [-1, 1] that are to have the labels y; of a VAE the KL of
    its posterior and the error of its reconstruction."""
    x = as_input(images)
    if vae:
        seen = net_T.encode(x)
        out, q, p = net_T.decode([torch.zeros_like(mean) for mean, _ in seen], seen)
        kl = sum(M.gaussian_kl(a, b).mean() for a, b in zip(q, p)) / x[0].numel() if alpha else torch.zeros((), device=device)
        return {'kl': kl, 'mse': F.mse_loss(out[:, :channels], x)}
    logits = net_T(x)
    adv = torch.zeros((), device=device)
    if net_S:
        logits_S = net_S(x)
        kl = F.kl_div(F.log_softmax(logits_S / tau, 1), F.log_softmax(logits / tau, 1), log_target=True, reduction='none').sum(1)
        adv = -(kl * (logits.argmax(1) == logits_S.argmax(1))).mean()          # only where the two still agree
    return {'bn': bn_distance(), 'cls': F.cross_entropy(logits, y), 'adv': adv}


def decode_slices(x0):
    """decode, a few latents at a time; their activations are made again for the gradient instead of being kept."""
    if not M.has_vae(net):
        return x0
    return torch.cat([checkpoint(M.decode, net, z, use_reentrant=False) for z in x0.split(decode_batch)])


def augment(x_t, out, g):
    """Latent CutMix, Eq. (11): a box of every walk, at most half as high and wide, comes from another walk.

    The network's output is mixed like x_t, so that the step that follows needs no further evaluation.
    """
    B, _, H, W = x_t.shape
    other = torch.randperm(B, generator=g)
    if lca == 'mixup':
        mask = torch.rand(B, 1, 1, 1, generator=g) / 2
    else:
        size, corner = torch.rand(2, B, 2, generator=g)
        low = corner * (1 - size / 2)                                          # inside the image
        high = low + size / 2
        rows, cols = (torch.arange(n) / n for n in (H, W))
        mask = (((rows >= low[:, :1]) & (rows < high[:, :1]))[:, None, :, None]
                & ((cols >= low[:, 1:]) & (cols < high[:, 1:]))[:, None, None, :]).float()
    mask = mask.to(device)
    return torch.lerp(x_t, x_t[other], mask), torch.lerp(out, out[other], mask)


def synthesize(shard, log):
    """One shard: batch_size walks from noise, (images uint8, labels, the t of each)."""
    g = torch.Generator().manual_seed(seed * 1_000_000 + shard)                # on the CPU: the same on every device
    x_t = torch.randn(shape, generator=g).to(device)
    y = ((shard * batch_size + torch.randperm(batch_size, generator=g)) % num_classes).to(device)
    cond = None
    if text and class_names:
        cond = y * len(STYLES) + torch.randint(len(STYLES), (batch_size,), generator=g).to(device)
    elif net.num_classes:                                                      # the prior's own classes, or any prompt
        cond = y if net.num_classes == num_classes else torch.randint(net.num_classes, (batch_size,), generator=g).to(device)
    guiding = eta > 0 and (alpha > 0 or beta > 0 or (gamma > 0 and net_S is not None))
    kept = []
    for i, (t, s) in enumerate(zip(times, [*times[1:], -1])):
        tt = torch.full((batch_size,), t, device=device)
        x_t.requires_grad_(guiding and grad_through_prior)
        with torch.set_grad_enabled(x_t.requires_grad), autocast:
            out = M.guided(net, x_t, tt, cond, guidance)                       # Eqs. (2), (3)
        x0 = diffusion.predict_x0(out, x_t, tt)                                # Eq. (4)

        # Eqs. (6)-(9). The gradient goes through the classifier and the decoder down to x_0; with grad_through_prior
        # it goes on through the denoiser down to x_t.
        point = x_t if x_t.requires_grad else x0.requires_grad_(guiding)
        with torch.set_grad_enabled(guiding):
            with autocast:
                images = decode_slices(x0)
            terms = inversion_losses(images, y)
            loss = sum(weight * term for weight, term in zip((alpha, beta, gamma), terms.values()))
        x_t, x0, out = x_t.detach(), x0.detach(), out.detach().float()
        if guiding:
            grad, = torch.autograd.grad(batch_size * loss, point)              # of each image, whatever the batch size
            # Eq. (10). As in classifier guidance the step shrinks with the noise, so that the prior repairs what it breaks;
            # a move of x_0, and a_t times that of x_t, leave the predicted eps what it was
            a_t, b_t = diffusion.ab(tt, x_t)
            move = (eta * b_t ** 2).to(x_t) * grad
            x0, x_t = x0 - move, x_t - a_t.to(x_t) * move
            x0 = x0.clamp(-1, 1) if diffusion.clip else x0
            out = torch.cat([diffusion.target(x0, x_t, tt, diffusion.prediction), out[:, shape[1]:]], dim=1)

        to_end = steps - 1 - i
        if to_end % keep_every == 0 and to_end // keep_every < keep:
            with torch.no_grad(), autocast:
                kept.append(torch.cat([resize(M.decode(net, z)) for z in x0.split(decode_batch)]))
        if lca != 'none' and (i + 1) % lca_every == 0 and to_end >= lca_every:  # time for repair is left
            x_t, out = augment(x_t, out, g)                                    # Eq. (11)
        if sampler == 'ddpm':
            x_t = diffusion.ddpm_step(out, x_t, tt, s, torch.randn(shape, generator=g).to(device))
        else:
            x_t = diffusion.ddim_step(out, x_t, tt, s)                         # Eq. (5)
        log(step=shard * steps + i + 1, t=t, loss=loss.item(), **{k: v.item() for k, v in terms.items()})
    return kept, y


# ---- the loop ----
os.makedirs(out_dir, exist_ok=True)
log = M.Log(os.path.join(out_dir, 'log.csv'), todo[0][0] * steps if todo else shards * steps) if rank == 0 else lambda **row: None
if rank == 0:
    print(f'teacher {teacher}, prior {prior}; {shards * batch_size * keep:,} images of {image_size}x{image_size} from '
          f'{shards * batch_size:,} walks of {steps} steps, in {shards} shards on {world} x {device.type}'
          + (f', {shards - len(todo)} of them made before' if world == 1 and len(todo) < shards else ''))
t0 = time.time()
try:
    for shard, path in tqdm(todo, disable=rank > 0, unit='shard'):
        images, y = synthesize(shard, log)
        arrays = {'arr_0': torch.cat([M.to_uint8(x) for x in images]).permute(0, 2, 3, 1).cpu().numpy(),
                  'settings': np.array(settings)}
        if not vae:
            arrays['arr_1'] = y.repeat(len(images)).cpu().numpy()
        arrays['t'] = np.repeat(times[-1 - (keep - 1) * keep_every::keep_every], batch_size)
        M.write_atomically(path, lambda tmp: np.savez_compressed(tmp, **arrays))
        if shard == 0:
            count = torch.bincount(y)
            rows = count.nonzero()[:20, 0]
            columns = min(10, count[rows].min().item())
            M.save_grid(os.path.join(out_dir, 'preview.png'),
                        torch.cat([images[-1][y == c][:100 if vae else columns] for c in rows]), columns)
except KeyboardInterrupt:
    print(f'\nstopped; the same command goes on from the last whole shard in {out_dir}')
    sys.exit(130)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
if rank == 0:
    print(f'{out_dir}: {shards} shards, {time.time() - t0:.0f} s; pictures: {out_dir}/preview.png')
    print('distil: python ' + (f'distill_vae.py --method=synthetic --data={out_dir} --teacher={teacher[4:]}' if vae else
                               f'distill_classifier.py --data={out_dir} --teacher={teacher}'))
