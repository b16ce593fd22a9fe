"""
DiffDFKD, second stage: distils a classifier into a smaller one on synthetic images (Qi et al. 2025, arXiv 2504.00870). The student
learns the teacher's outputs and where it looks; labels are not needed. With `method='data'` it trains a classifier on
labelled images instead, which is how teachers are made.

    python synthesize.py && python distill_classifier.py --test=mnist   # the bundled teacher, on a laptop
    python distill_classifier.py config/distill_cifar10_r34_r18.py      # a pair of the paper's Table I
    torchrun --nproc_per_node=8 distill_classifier.py config/distill_cifar10_r34_r18.py
    python distill_classifier.py config/mnist_classifier.py --data=mnist   # the bundled teacher itself
"""
import os
import time

# images
data = 'out/synth'           # an .npz, a folder of shards or of images, or a torchvision name (downloaded)
test = ''                    # labelled images to test on: as above; '' is the test split of a torchvision name, else none
holdout = 400                # images kept out of the training: on them student and teacher are compared; 0 for none
augment_crop = 2             # random crops from images padded by so many pixels; 0 for none
augment_flip = False         # random horizontal flips
# teacher
method = 'distill'           # 'distill': from the teacher; 'data': cross-entropy on the labels, no teacher
teacher = 'pretrained/mnist_resnet.safetensors'  # a classifier of ours, a state dict of a ResNet, WRN or VGG, torchvision:NAME
teacher_source = ''          # where a missing teacher is to be had, for the message
teacher_config = {}          # what a state dict does not say: image_size, mean, std (models.load_classifier)
# student
student = 'resnet8'          # resnet8, 14 ... 110, resnet18/34/50, wrn16_1 ... wrn40_2, vgg11 ... vgg19, torchvision:NAME
width = 8                    # channels of the first stage of a ResNet; 0 is its usual width
# losses, Eq. (12)
lam_kl = 1.0                 # weight of the divergence of the outputs
temperature = 4.0            # of both outputs in it
lam_msarc = 1.0              # weight of the distance of the class activation maps, L_msarc
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
init_from = 'scratch'        # 'scratch' or 'resume'
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 on GPUs that have it), 'bfloat16', 'float32'
compile = False              # torch.compile, for GPUs
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import models as M

# ---- check everything before any work starts ----
for wrong, message in [
        (method not in ('distill', 'data'), f"method={method!r}: 'distill' or 'data'"),
        (optimizer not in ('sgd', 'adamw'), f"optimizer={optimizer!r}: 'sgd' or 'adamw'"),
        (init_from not in ('scratch', 'resume'), f"init_from={init_from!r}: 'scratch' or 'resume'"),
        (min(lam_kl, lam_msarc, holdout, width, augment_crop, warmup_epochs) < 0 or temperature <= 0,
         'lam_kl, lam_msarc, holdout, width, augment_crop, warmup_epochs: 0 or more; temperature: above 0'),
        (method == 'distill' and lam_kl == lam_msarc == 0, 'lam_kl=0 and lam_msarc=0 leave nothing to learn'),
        (method == 'distill' and compile and lam_msarc > 0,
         'compile=True cannot differentiate L_msarc, which is made of gradients: --compile=False or --lam_msarc=0'),
        (min(epochs, batch_size) < 1, 'epochs and batch_size: at least 1')]:
    if wrong:
        M.die(message)
device, autocast, rank, world = M.start(device, dtype, seed)
if batch_size % world:
    M.die(f'batch_size={batch_size} is shared by {world} ranks: a multiple of {world}')
distilling = method == 'distill'
try:
    net_T = M.load_classifier(teacher, **teacher_config).to(device, memory_format=M.memory_format(device)) if distilling else None
    images, labels = M.load_images(data)
    is_name = not (data.endswith('.npz') or os.path.isdir(data))
    test_images, test_labels = M.load_images(test or data, train=False) if test or is_name else (None, None)
    if labels is None and not distilling:
        raise ValueError(f"{data} has no labels ('arr_1', or a subfolder per class)")
    if len(images) - holdout < batch_size:
        raise ValueError(f'{data} has {len(images)} images; holdout={holdout} leaves fewer than batch_size={batch_size}')
    if test_images is not None and (test_labels is None or test_images.shape[1:] != images.shape[1:]):
        raise ValueError(f'{test or data}: test images are {tuple(test_images.shape[1:])}, with labels '
                         f'{test_labels is not None}; the training images {tuple(images.shape[1:])}')
    if images.shape[2] != images.shape[3]:
        raise ValueError(f'{data}: images must be square, they are {images.shape[2]}x{images.shape[3]}')
    kw = {'width': width} if width and student.startswith('resnet') else {}
    if distilling:                                                             # the teacher's classes, size and normalisation
        config = net_T.config
        if config.get('in_channels', 3) != images.shape[1]:
            raise ValueError(f"{data} has {images.shape[1]} channels, {teacher} takes {config.get('in_channels', 3)}")
        if test_images is not None and test_labels.max() >= config['num_classes']:
            raise ValueError(f"{test or data} has labels up to {test_labels.max()}, {teacher} has {config['num_classes']} classes")
        kw |= {k: config[k] for k in ('num_classes', 'image_size', 'mean', 'std')}
    else:                                                                      # the network sees mean 0 and deviation 1
        pixels = images[:10000].float() / 255
        kw |= dict(num_classes=int(labels.max()) + 1, image_size=images.shape[-1], mean=pixels.mean((0, 2, 3)).tolist(),
                   std=pixels.std((0, 2, 3)).clamp(min=1e-3).tolist())
    net = M.classifier(student, in_channels=images.shape[1], **kw)
    checkpoint = M.load_checkpoint(out_dir, rank) if init_from == 'resume' else None
    if checkpoint:
        M.load_state(net, checkpoint[0]['net'], out_dir)
except ValueError as e:
    M.die(f'{e}; get {teacher_source}' if teacher_source and not os.path.exists(teacher) else str(e))
# the same images on all ranks, whatever their number: kept out, so that the best epoch is not chosen on test images
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
held_images, held_labels = images[order[:holdout]], None if distilling else labels[order[:holdout]]
train = order[holdout:]

net = net.to(device, memory_format=M.memory_format(device))
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


model = torch.compile(WithMaps()) if compile else WithMaps()
if world > 1:
    model = torch.nn.parallel.DistributedDataParallel(model)
if rank:
    torch.manual_seed(seed + rank)                                             # crops of its own for every rank
epoch, best = 0, -1.
if checkpoint:
    shared, own = checkpoint
    opt.load_state_dict(shared['opt'])
    epoch, best = shared['step'], shared['best']
    M.set_random_state(own, device)
os.makedirs(out_dir, exist_ok=True)
log = M.Log(os.path.join(out_dir, 'log.csv'), epoch) if rank == 0 else None
stop = M.stop_flag()
if rank == 0:
    print(f'{student}: {sum(p.numel() for p in net.parameters()):,} parameters'
          + (f', teacher {teacher}: {sum(p.numel() for p in net_T.parameters()):,}' if distilling else '')
          + f"; {len(train):,} images of {tuple(images.shape[1:])}, {net.config['num_classes']} classes")


# ---- losses ----
def kl_loss(logits_S, logits_T):
    """Divergence of the softened outputs (Hinton et al. 2015), times T^2, so that its gradient does not shrink with T."""
    return F.kl_div(F.log_softmax(logits_S / temperature, 1), F.log_softmax(logits_T / temperature, 1), log_target=True,
                    reduction='batchmean') * temperature ** 2


def activation_regions(logits, maps, c, create_graph):
    """Where a network sees class c (B,): Grad-CAM of every stage, (B, h, w) each, of length 1 (Selvaraju et al. 2017)."""
    score = logits.gather(1, c[:, None]).sum()
    regions = []
    for a, grad in zip(maps, torch.autograd.grad(score, maps, create_graph=create_graph)):
        cam = F.relu((grad.mean((2, 3), keepdim=True) * a).sum(1))
        regions.append(F.normalize(cam.flatten(1), dim=1).view_as(cam))
    return regions


def msarc_loss(regions_S, regions_T):
    """L_msarc of Eq. (12): distance of the two networks' regions, the last stages paired, at the student's resolution."""
    total = 0.
    for r_S, r_T in zip(reversed(regions_S), reversed(regions_T)):
        if r_T.shape != r_S.shape:
            r_T = F.interpolate(r_T[:, None], size=r_S.shape[1:], mode='bilinear', antialias=True, align_corners=False)[:, 0]
            r_T = F.normalize(r_T.flatten(1), dim=1).view_as(r_S)
        total += (r_S - r_T).square().sum((1, 2)).mean()
    return total


def losses(x, y):
    """The student's losses on images (B, C, H, W) in [-1, 1], as a dict; their sum, weighted, is Eq. (12)."""
    x = M.preprocess(net, x)
    with autocast:
        logits_S, maps_S = model(x)
    if not distilling:
        return {'ce': F.cross_entropy(logits_S.float(), y, label_smoothing=label_smoothing)}
    x.requires_grad_(lam_msarc > 0)                                            # else a frozen teacher has no gradient
    with torch.set_grad_enabled(lam_msarc > 0), autocast:
        logits_T, maps_T = net_T.forward_features(x)
    out = {'kl': lam_kl * kl_loss(logits_S.float(), logits_T.detach().float())}
    if lam_msarc:
        c = logits_T.argmax(1)                                                 # the class that the teacher sees
        regions_T = [r.detach() for r in activation_regions(logits_T, maps_T, c, False)]
        out['msarc'] = lam_msarc * msarc_loss(activation_regions(logits_S, maps_S, c, True), regions_T)
    return out


def augment(x):
    """Each image of a batch (B, C, H, W) is cropped at a place of its own, and flipped or not."""
    B, H = len(x), x.shape[-1]
    if augment_crop:
        padded = F.pad(x, [augment_crop] * 4, value=-1)                        # black
        top, left = torch.randint(0, 2 * augment_crop + 1, (2, B, 1))
        rows, cols = top + torch.arange(H), left + torch.arange(H)
        x = padded[torch.arange(B)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    if augment_flip:
        x = torch.where(torch.rand(B, 1, 1, 1) < 0.5, x.flip(-1), x)
    return x


@torch.no_grad()
def predictions(net, images):
    """The class that a network sees in each of the uint8 images; every rank does its share, all get the sum."""
    net.eval()
    found = torch.zeros(len(images), device=device)
    for i in range(rank * 500, len(images), world * 500):
        x = M.to_float(images[i:i + 500]).to(device, memory_format=M.memory_format(device))
        with autocast:
            found[i:i + 500] = net(M.preprocess(net, x)).argmax(1).float()
    if world > 1:
        dist.all_reduce(found)
    return found.long().cpu()


def agreement(a, b):
    return (a == b).float().mean().item()


if distilling:
    held_labels = predictions(net_T, held_images)
    if test_images is not None:
        accuracy_T = agreement(predictions(net_T, test_images), test_labels)
        if rank == 0:
            print(f'teacher: test accuracy {100 * accuracy_T:.2f} %')

# ---- the loop ----
steps_per_epoch = len(train) // batch_size
t0 = time.time()
while epoch < epochs:
    net.train()
    order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + epoch))]  # the same on all ranks
    order = order[:steps_per_epoch * batch_size].view(steps_per_epoch, world, -1)[:, rank]
    bar = tqdm(order, desc=f'epoch {epoch + 1}/{epochs}', disable=rank > 0, leave=False, mininterval=1)
    sums = {}
    for i, idx in enumerate(bar):
        done = epoch + i / steps_per_epoch
        scale = min(1., (done + 1 / steps_per_epoch) / warmup_epochs) if warmup_epochs else 1.
        for g in opt.param_groups:
            g['lr'] = lr * scale * 0.5 * (1 + math.cos(math.pi * done / epochs))
        x = augment(M.to_float(images[idx])).to(device, memory_format=M.memory_format(device))
        terms = losses(x, None if distilling else labels[idx].to(device))
        loss = sum(terms.values())                                             # Eq. (12)
        if not torch.isfinite(loss):
            bar.close()
            M.die(f'the loss is {loss.item()} in epoch {epoch + 1}: a smaller --lr; the last checkpoint is untouched')
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        for k, v in terms.items():
            sums[k] = sums.get(k, 0.) + v.item() / steps_per_epoch
        if i % 20 == 0:
            bar.set_postfix(loss=f'{loss.item():.3f}')
        if M.on_all(dist.ReduceOp.MAX, len(stop)):
            break
    if M.on_all(dist.ReduceOp.MAX, len(stop)):
        break                                                                  # the checkpoint of the last epoch stands
    epoch += 1
    row = dict(step=epoch, loss=sum(sums.values()), **sums)
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
    M.save_checkpoint(out_dir, epoch, {'net': net.state_dict(), 'opt': opt.state_dict(), 'best': best},
                      M.random_state(device), rank)
if rank == 0:
    print(f'student: {out_dir}/student.safetensors, {time.time() - t0:.0f} s' if epoch else 'stopped before the first epoch was complete')
if world > 1:
    dist.destroy_process_group()
