"""
DiffDFKD, second stage: distils a classifier into a smaller one on synthetic images (Qi et al. 2025, arXiv 2504.00870).
The student learns the teacher's outputs and where it looks; labels are not needed. With `method='data'` it trains a
classifier on labelled images instead, which is how teachers are made; `method='test'` prints the accuracy of one.

    python synthesize.py && python distill_classifier.py --test=mnist   # the bundled teacher, on a laptop
    python distill_classifier.py config/distill_cifar10_r34_r18.py      # a pair of the paper's Table I
    torchrun --nproc_per_node=8 distill_classifier.py config/distill_cifar10_r34_r18.py
    python distill_classifier.py config/mnist_classifier.py --data=mnist   # the bundled teacher itself
    python distill_classifier.py --method=test --teacher=out/classifier/student.safetensors --test=mnist:5-9
"""
import os
import time

# images
data = 'out/synth'           # an .npz, a folder of shards or of images, a list of files, or a torchvision name
                             # (downloaded); with classes, mnist:0-4, of these alone (models.load_images)
test = ''                    # labelled images to test on, as above; '' is a torchvision name's test split, else none
image_size = 0               # side to which images are resized on load; 0 is as they are
holdout = 400                # images kept out of the training: on them student and teacher are compared; 0 for none
augment_crop = 2             # random crops from images padded by so many pixels; 0 for none
augment_flip = False         # random horizontal flips
# teacher
method = 'distill'           # 'distill': from the teacher; 'data': cross-entropy on the labels, no teacher; 'test'
teacher = 'pretrained/mnist_resnet.safetensors'  # a classifier of ours, a state dict of a ResNet, WRN or VGG,
                             # or torchvision:NAME
teacher_source = ''          # where a missing teacher is to be had, for the message
teacher_config = {}          # what a state dict does not say: image_size, mean, std (models.load_classifier)
any_teacher = False          # take images that synthesize.py made for another teacher
# student
student = 'resnet8'          # resnet8, 14 ... 110, resnet18/34/50, wrn16_1 ... wrn40_2, vgg11 ... vgg19, or
                             # torchvision:NAME
width = 8                    # channels of the first stage of a ResNet; 0 is its usual width
# losses, Eq. (12)
lam_kl = 1.0                 # weight of the divergence of the outputs
temperature = 4.0            # of both outputs in it
lam_msarc = 0.1              # weight of the distance of the class activation maps, L_mSARC; SpaceshipNet's is 1
label_smoothing = 0.0        # 'data'
# optimisation
epochs = 12
batch_size = 128             # over all ranks
optimizer = 'sgd'            # 'sgd' (momentum 0.9) or 'adamw'
lr = 0.1                     # cosine decay to 0
warmup_epochs = 1            # linear warm-up; 0 for none
weight_decay = 5e-4
# system
out_dir = 'out/classifier'
init_from = 'scratch'        # 'scratch', 'resume', or the file of a student that goes on
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16', 'float32'
compile = False              # torch.compile, for GPUs
_ranges = {                  # what configurator.py does not know of itself
    'method': ('distill', 'data', 'test'), 'optimizer': ('sgd', 'adamw'), 'holdout': (0, 10 ** 9),
    'width': (0, 10 ** 4), 'augment_crop': (0, 1000), 'temperature': (1e-30, 1e30), 'label_smoothing': (0, 1),
    'warmup_epochs': (0, 10 ** 9), 'image_size': (0, 4096)}
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
settings = {k: globals()[k] for k in _defaults}

import glob
import json
import math
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import models as M

# ---- the method ----
#   for each batch x of the images, cropped and flipped:
#       logits_S, maps_S = student(x);  logits_T, maps_T = teacher(x)
#       L = lam_kl KL(teacher || student, softened) + lam_msarc L_mSARC(maps_S, maps_T)            Eq. (12)
#       student <- student - lr grad L
# L_mSARC asks where the two look: after the last stage for every class, after the earlier ones for the teacher's class.
def kl_loss(logits_S, logits_T):
    """Divergence of the softened outputs (Hinton et al. 2015), times T^2: its gradient does not shrink with T."""
    return F.kl_div(F.log_softmax(logits_S / temperature, 1), F.log_softmax(logits_T / temperature, 1), log_target=True,
                    reduction='batchmean') * temperature ** 2


def pairs_of_stages(maps_S, maps_T):
    """The student's stages before its last, each with the teacher's last one of the same resolution, if it has one."""
    stages_T = {m.shape[2:]: i for i, m in enumerate(maps_T[:-1])}
    return [(i, stages_T[m.shape[2:]]) for i, m in enumerate(maps_S[:-1]) if m.shape[2:] in stages_T]


def grad_cam(logits, maps, c):
    """Where a network sees class c (B,): the channels of each map, summed with the mean gradient of the class's logit
    as weights, which are constants (Selvaraju et al. 2017, without ReLU). (B, h, w) each."""
    grads = torch.autograd.grad(logits.gather(1, c[:, None]).sum(), maps, retain_graph=True)
    return [(grad.mean((2, 3), keepdim=True) * a).sum(1).float() for grad, a in zip(grads, maps)]


def msarc_loss(logits_S, maps_S, logits_T, maps_T):
    """L_mSARC of Eq. (12) (SpaceshipNet, Yu et al. 2023): the class activation maps of all classes after the last
    stage, and Grad-CAM of the class that the teacher sees after each earlier one."""
    cam_S, cam_T = (F.conv2d(maps[-1].float(), head.weight[:, :, None, None])
                    for maps, head in ((maps_S, head_S), (maps_T, head_T)))
    if cam_T.shape != cam_S.shape:
        cam_T = F.interpolate(cam_T, size=cam_S.shape[2:], mode='bilinear', antialias=True, align_corners=False)
    total = F.mse_loss(cam_S, cam_T.detach())
    pairs = pairs_of_stages(maps_S, maps_T)
    if pairs:
        c = logits_T.argmax(1)
        seen_S, seen_T = (grad_cam(*network, c) for network in ((logits_S, [maps_S[i] for i, _ in pairs]),
                                                                (logits_T, [maps_T[j] for _, j in pairs])))
        total = total + sum(F.mse_loss(a, b.detach()) for a, b in zip(seen_S, seen_T))
    return total


def losses(x, y):
    """The student's losses on uint8 images (B, C, H, W), as a dict; their sum, weighted, is Eq. (12)."""
    x = M.preprocess(net, M.to_float(x))
    with autocast:
        logits_S, maps_S = model(x)
    if not distilling:
        return {'ce': F.cross_entropy(logits_S.float(), y, label_smoothing=label_smoothing)}
    x.requires_grad_(lam_msarc > 0)                                            # else a frozen teacher has no gradient
    with torch.set_grad_enabled(lam_msarc > 0), autocast:
        logits_T, maps_T = net_T.forward_features(x)
    out = {'kl': lam_kl * kl_loss(logits_S.float(), logits_T.detach().float())}   # at 0 too: all have a gradient then
    if lam_msarc:
        out['msarc'] = lam_msarc * msarc_loss(logits_S, maps_S, logits_T, maps_T)
    return out


def augment(x):
    """Each uint8 image of a batch (B, C, H, W) is cropped at a place of its own, and flipped or not."""
    B, H = len(x), x.shape[-1]
    if augment_crop:
        padded = F.pad(x, [augment_crop] * 4)                                  # black
        top, left = torch.randint(0, 2 * augment_crop + 1, (2, B, 1), device=device)
        rows, cols = top + torch.arange(H, device=device), left + torch.arange(H, device=device)
        batch = torch.arange(B, device=device)[:, None, None]
        x = padded[batch, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    if augment_flip:
        x = torch.where(torch.rand(B, 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
    return x.contiguous(memory_format=M.memory_format(device))


# ---- check everything before any work starts ----
for wrong, message in [
        (method == 'distill' and lam_kl == lam_msarc == 0, 'lam_kl=0 and lam_msarc=0 leave nothing to learn'),
        (method == 'test' and not test, "method='test' needs images: --test=mnist, an .npz or a folder")]:
    if wrong:
        M.die(message)
device, autocast, rank, world = M.start(device, dtype, seed)
M.share(batch_size, world)
distilling = method == 'distill'


def check_origin(data, digest):
    """Raises ValueError if a shard of the folder `data` says that synthesize.py made it for another teacher."""
    for f in sorted(glob.glob(os.path.join(glob.escape(data), '**', '*.npz'), recursive=True)):
        settings = json.loads(str(M.read_npz(f).get('settings', '{}')))
        if settings.get('teacher_digest', digest) != digest:
            raise ValueError(f"{f} was made for the teacher {settings['teacher']}, which is not {teacher}: "
                             'its own images, or --any_teacher=True')


def linear(net):
    """The last linear layer of a classifier, where all that it sees is the mean of the last map: its weights make the
    class activation maps. Raises ValueError."""
    shape = 2, net.config.get('in_channels', 3), net.config['image_size'], net.config['image_size']
    with torch.no_grad():
        logits, maps = net.eval().forward_features(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        layer = net.get_submodule(net.head_name)
        if layer.in_features != maps[-1].shape[1] or (
                (layer(maps[-1].mean((2, 3))) - logits).abs().max() > 1e-3 * (1 + logits.abs().max())):
            raise ValueError(f"{net.config['name']} has no class activation maps, its last layer sees more than the "
                             'mean of the last map: --lam_msarc=0')
    return layer


try:
    net_T = None if method == 'data' else M.load_classifier(teacher, **teacher_config)
    if distilling:
        settings['teacher_digest'] = M.digest(net_T)
        if not any_teacher:
            check_origin(data, settings['teacher_digest'])
    images, labels = M.load_images(data, image_size=image_size) if method != 'test' else (None, None)
    path = data.split(':')[0]
    is_name = method != 'test' and not (path.endswith(('.npz', '.txt')) or os.path.isdir(path))
    test_images = test_labels = None
    if test or is_name:
        test_images, test_labels = M.load_images(test or data, train=False, image_size=image_size)
    images = test_images if images is None else images
    if labels is None and method == 'data':
        raise ValueError(f"{data} has no labels ('arr_1', or a subfolder per class)")
    if method != 'test' and len(images) - holdout < batch_size:
        raise ValueError(f'{data} has {len(images)} images; holdout={holdout} leaves fewer than a batch of '
                         f'{batch_size}: a smaller --holdout or --batch_size')
    if test_images is not None and (test_labels is None or test_images.shape[1:] != images.shape[1:]):
        raise ValueError(f'{test or data}: test images are {tuple(test_images.shape[1:])}, with labels '
                         f'{test_labels is not None}; the training images {tuple(images.shape[1:])}')
    if images.shape[2] != images.shape[3]:
        raise ValueError(f'{data}: images must be square, they are {images.shape[2]}x{images.shape[3]}')
    if net_T is not None:
        config = net_T.config
        if config.get('in_channels', 3) != images.shape[1]:
            raise ValueError(f"{data} has {images.shape[1]} channels, {teacher} takes {config.get('in_channels', 3)}")
        if test_images is not None and test_labels.max() >= config['num_classes']:
            raise ValueError(f"{test or data} has labels up to {test_labels.max()}, {teacher} has "
                             f"{config['num_classes']} classes")
    kw = {'width': width} if width and student.startswith('resnet') else {}
    if net_T is not None:                                                      # the teacher's size and normalisation
        kw |= {k: config[k] for k in ('num_classes', 'image_size', 'mean', 'std')}
    else:                                                                      # the network sees mean 0 and deviation 1
        pixels = images[:10000].float() / 255
        kw |= dict(num_classes=int(labels.max()) + 1, image_size=images.shape[-1], mean=pixels.mean((0, 2, 3)).tolist(),
                   std=pixels.std((0, 2, 3)).clamp(min=1e-3).tolist())
    net = M.make('classifier', name=student, in_channels=images.shape[1], **kw)
    head_S, head_T = (linear(net), linear(net_T)) if distilling and lam_msarc else (None, None)
    checkpoint = M.resume(settings, rank, net) if method != 'test' else None
except (ValueError, RuntimeError, TypeError) as e:
    M.die(f'{e}; get {teacher_source}' if teacher_source and not os.path.exists(teacher) else str(e))
if net_T is not None:
    net_T = net_T.to(device, memory_format=M.memory_format(device))
net = net.to(device, memory_format=M.memory_format(device))


@torch.no_grad()
def predictions(net, images):
    """The class that a network sees in each of the uint8 images; every rank does its share, all get the sum."""
    net.eval()
    found = torch.zeros(len(images), device=device)
    for i in range(rank * 500, len(images), world * 500):
        x = M.to_float(images[i:i + 500].to(device, memory_format=M.memory_format(device)))
        with autocast:
            found[i:i + 500] = net(M.preprocess(net, x)).argmax(1).float()
    if world > 1:
        dist.all_reduce(found)
    return found.long().cpu()


def agreement(a, b):
    return (a == b).float().mean().item()


if net_T is not None and test_images is not None:
    accuracy_T = agreement(predictions(net_T, test_images), test_labels)
    if rank == 0:
        print(f"{'teacher' if distilling else teacher}: test accuracy {100 * accuracy_T:.2f} % of "
              f'{len(test_images):,} images')
if method == 'test':
    sys.exit()

# the same images on all ranks, whatever their number: kept out, so that the best epoch is not chosen on test images
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
held_images, train = images[order[:holdout]], order[holdout:]
held_labels = predictions(net_T, held_images) if distilling else labels[order[:holdout]]
fits = device.type != 'cuda' or images.numel() < torch.cuda.mem_get_info()[0] / 2
home = device if fits else 'cpu'                                               # where the images live
images, labels = images.to(home), None if distilling else labels.to(home)

decay = [p for p in net.parameters() if p.ndim > 1]                            # no decay of biases and BatchNorm
groups = [{'params': decay, 'weight_decay': weight_decay},
          {'params': [p for p in net.parameters() if p.ndim <= 1], 'weight_decay': 0.}]
opt = torch.optim.SGD(groups, lr, momentum=0.9) if optimizer == 'sgd' else torch.optim.AdamW(groups, lr)


class WithMaps(torch.nn.Module):
    """The student as DistributedDataParallel wants it: what the losses need is what forward returns."""

    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.forward_features(x)


if compile:                                                                    # by stages: Grad-CAM needs their maps
    torch._functorch.config.donated_buffer = False                             # ... and goes back through them twice
    torch._dynamo.config.cache_size_limit = 64                                 # counted over all stages together
    for module in [m for n in (net, net_T) if n is not None for k, m in n.named_modules()
                   if isinstance(m, torch.nn.Sequential) and k.count('.') < 2]:
        module.compile()
model = WithMaps()
if world > 1:
    model = torch.nn.parallel.DistributedDataParallel(model)
if rank:
    torch.manual_seed(seed + rank)                                             # crops of its own for every rank
steps_per_epoch = len(train) // batch_size
epoch, first, sums, best = 0, 0, 0., -1.
if checkpoint:
    shared, own = M.go_on(checkpoint, opt)
    epoch, first = divmod(shared['step'], steps_per_epoch)                     # a signal saves within an epoch
    sums, best = torch.as_tensor(own['sums'], device=device), shared['best']
log = M.Log(os.path.join(out_dir, 'log.csv'), epoch) if rank == 0 else None
stop = M.stop_flag()
if rank == 0:
    print(f'{student}: {sum(p.numel() for p in net.parameters()):,} parameters'
          + (f', teacher {teacher}: {sum(p.numel() for p in net_T.parameters()):,}' if distilling else '')
          + f"; {len(train):,} images of {tuple(images.shape[1:])}, {net.config['num_classes']} classes")


# ---- the loop ----
t0, row, leaving = time.time(), {}, 0
while epoch < epochs:
    net.train()
    g = torch.Generator().manual_seed(seed + epoch)                            # the same order on all ranks
    order = train[torch.randperm(len(train), generator=g)]
    order = order[:steps_per_epoch * batch_size].view(steps_per_epoch, world, -1)[:, rank].to(home)
    for i in tqdm(range(first, steps_per_epoch), f'epoch {epoch + 1}/{epochs}', disable=rank > 0, leave=False):
        leaving = (world == 1 or i % 20 == 0) and M.largest(sum(stop[:1]))
        if leaving:
            break
        idx, done = order[i], epoch + i / steps_per_epoch
        scale = min(1., (done + 1 / steps_per_epoch) / warmup_epochs) if warmup_epochs else 1.
        for g in opt.param_groups:
            g['lr'] = lr * scale * 0.5 * (1 + math.cos(math.pi * done / epochs))
        x = augment(images[idx].to(device, non_blocking=True))
        terms = losses(x, None if distilling else labels[idx].to(device, non_blocking=True))
        sum(terms.values()).backward()                                         # Eq. (12)
        opt.step()
        opt.zero_grad(set_to_none=True)
        sums = sums + torch.stack(list(terms.values())).detach()
    if (~torch.stack([p.sum() for p in net.parameters()]).isfinite()).any():   # from here on the host has waited
        M.die(f'the weights are not finite in epoch {epoch + 1}: a smaller --lr; the last checkpoint is untouched')
    if leaving:
        M.save_checkpoint(settings, epoch * steps_per_epoch + i, net, opt, {'best': best}, {'sums': sums}, rank)
        break
    epoch += 1
    means = dict(zip(terms, (sums / steps_per_epoch).tolist()))
    first, sums = 0, 0.
    row = dict(step=epoch, loss=sum(means.values()), **means)
    if holdout:
        row['agreement'] = agreement(predictions(net, held_images), held_labels)
    if test_images is not None:
        row['test_accuracy'] = agreement(predictions(net, test_images), test_labels)
    if rank == 0:
        print(f'epoch {epoch}: ' + ', '.join(f'{k} {v:.4f}' for k, v in row.items() if k != 'step'))
        log(**row, lr=opt.param_groups[0]['lr'], seconds=time.time() - t0)
        M.save_model(net, os.path.join(out_dir, 'student.safetensors'))
        if holdout and row['agreement'] > best:
            M.save_model(net, os.path.join(out_dir, 'best.safetensors'))
    best = max(best, row.get('agreement', -1.))
    M.save_checkpoint(settings, epoch * steps_per_epoch, net, opt, {'best': best}, {'sums': sums}, rank)
if rank == 0:
    print(f'student: {out_dir}/student.safetensors, {time.time() - t0:.0f} s' if epoch else
          'stopped before the first epoch was complete')
    if 'test_accuracy' in row:
        print(f'test accuracy of the student {100 * row["test_accuracy"]:.2f} %'
              + (f', of the teacher {100 * accuracy_T:.2f} %' if distilling else ''))
M.leave(leaving)
