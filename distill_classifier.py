"""
DiffDFKD, second stage: distils a classifier into a smaller one on synthetic images (Qi et al. 2025,
arXiv 2504.00870). The student learns the teacher's outputs and its class activation maps; labels
are not needed. With `method='data'` it trains a classifier on labelled images instead, which is how
teachers are made; `method='test'` prints the accuracy of one.

    # the bundled teacher, on a laptop
    python synthesize.py && python distill_classifier.py --test=mnist
    python distill_classifier.py config/distill_cifar10.py   # a pair of the paper's Table I
    torchrun --nproc_per_node=8 distill_classifier.py config/distill_cifar10.py
    # the bundled teacher itself
    python distill_classifier.py config/mnist_classifier.py --data=mnist
    # the accuracy of a student
    python distill_classifier.py --method=test --teacher=out/classifier/student.safetensors \\
        --test=mnist:5-9
"""
import os

# images
data = 'out/synth'           # an .npz, a folder of shards or of images, a list of files, or a
                             # torchvision name (downloaded); mnist:0-4 takes only these classes
                             # (models.load_images)
test = ''                    # labelled images to test on, as above; '' is the test split if
                             # `data` is a torchvision name, else none
image_size = 0               # side to which images are resized on load; 0 is as they are
holdout = 400                # images held out of the training: best.safetensors is the epoch that
                             # agrees best with the teacher (or the labels) on these, and
                             # student.safetensors the last one; 0 for none
augment_crop = 2             # random crops from images padded by this many pixels; 0 for none
augment_flip = False         # random horizontal flips
# teacher
method = 'distill'           # 'distill': from the teacher; 'data': cross-entropy on the labels, no
                             # teacher; 'test'
teacher = 'pretrained/mnist_resnet.safetensors'  # a classifier of ours, a state dict of a ResNet,
                             # WRN or VGG, torchvision:NAME, or a Python file with load()
teacher_config = {}          # what a state dict does not record: image_size, mean, std
                             # (models.load_classifier)
any_teacher = False          # accept images that synthesize.py made for another teacher
# student
student = 'resnet8'          # resnet8, 14 ... 110, resnet18/34/50, wrn16_1 ... wrn40_2, vgg11 ...
                             # vgg19, torchvision:NAME, or a Python file with build()
width = 8                    # channels of the first stage of a ResNet; 0 is its usual width
# losses, Eq. (12)
lam_kl = 1.0                 # weight of the KL of the outputs
temperature = 4.0            # softens both outputs in the KL
lam_msarc = 0.1              # weight of the distance of the class activation maps, L_mSARC;
                             # SpaceshipNet's is 1, and was better in all trials (docs/log.md)
label_smoothing = 0.0        # of the cross-entropy of method='data'
# optimisation
epochs = 12
batch_size = 128             # over all ranks
optimizer = 'sgd'            # 'sgd' (momentum 0.9) or 'adamw'
lr = 0.1                     # cosine decay to 0
warmup_epochs = 1            # linear warm-up; 0 for none
weight_decay = 5e-4
# system
out_dir = 'out/classifier'
init_from = 'scratch'        # 'scratch'; 'resume'; 'overwrite' begins anew where an unfinished run
                             # lies; or a student's file to start from
seed = 0
device = 'auto'              # 'auto', 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = 'auto'               # 'auto' (bfloat16 where the GPU or CPU computes in it), 'bfloat16',
                             # 'float32'
compile = False              # torch.compile, for GPUs
_ranges = {                  # allowed values of string settings
    'method': ('distill', 'data', 'test'), 'optimizer': ('sgd', 'adamw'),
    'dtype': ('auto', 'bfloat16', 'float32')}
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import contextlib
import json
import math
import shlex
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import models as M

image_sets = M.adapter('images')


# ==== the method ====
#   for each batch x of the images, cropped and flipped:
#       logits_S, maps_S = student(x);  logits_T, maps_T = teacher(x)
#       L = lam_kl KL(teacher || student, softened) + lam_msarc L_mSARC(maps_S, maps_T)     Eq. (12)
#       student <- student - lr grad L
# L_mSARC compares class activation maps: of all classes after the last stage, and of the class that
# the teacher predicts after the earlier stages.
def kl_loss(logits_S, logits_T, temperature=4.0):
    """KL(teacher || student) of the softened outputs (Hinton et al. 2015), times temperature^2, so
    that the gradient does not shrink with the temperature."""
    log_p_S = F.log_softmax(logits_S / temperature, 1)
    log_p_T = F.log_softmax(logits_T / temperature, 1)
    return F.kl_div(log_p_S, log_p_T, log_target=True, reduction='batchmean') * temperature**2


def pairs_of_stages(maps_S, maps_T):
    """Pairs (i, j): each stage i of the student before its last, with the teacher's last such stage
    j of the same resolution, if there is one."""
    by_size = {m.shape[2:]: i for i, m in enumerate(maps_T[:-1])}
    return [(i, by_size[m.shape[2:]]) for i, m in enumerate(maps_S[:-1]) if m.shape[2:] in by_size]


def grad_cam(logits, maps, c):
    """Grad-CAM of class c (B,) for each map: the sum of its channels, weighted by the mean gradient
    of the class's logit (Selvaraju et al. 2017, without ReLU). The weights are constants. Returns a
    list of (B, h, w)."""
    grads = torch.autograd.grad(logits.gather(1, c[:, None]).sum(), maps, retain_graph=True)
    return [(grad.mean((2, 3), keepdim=True) * m).sum(1).float() for grad, m in zip(grads, maps)]


def class_maps(last_map, head):
    """The activation maps (B, classes, h, w): the linear layer as a 1x1 convolution."""
    return F.conv2d(last_map.float(), head.weight[:, :, None, None])


def msarc_loss(logits_S, maps_S, head_S, logits_T, maps_T, head_T):
    """L_mSARC of Eq. (12) (SpaceshipNet, Yu et al. 2023): the class activation maps of all classes
    after the last stage, and Grad-CAM of the class that the teacher predicts after each earlier
    one. head_S, head_T: the last linear layers."""
    cam_S = class_maps(maps_S[-1], head_S)
    cam_T = class_maps(maps_T[-1], head_T)
    if cam_T.shape != cam_S.shape:
        cam_T = F.interpolate(
            cam_T, size=cam_S.shape[2:], mode='bilinear', antialias=True, align_corners=False
        )
    total = F.mse_loss(cam_S, cam_T.detach())
    pairs = pairs_of_stages(maps_S, maps_T)
    if pairs:
        c = logits_T.argmax(1)
        seen_S = grad_cam(logits_S, [maps_S[i] for i, _ in pairs], c)
        seen_T = grad_cam(logits_T, [maps_T[j] for _, j in pairs], c)
        total = total + sum(F.mse_loss(a, b.detach()) for a, b in zip(seen_S, seen_T))
    return total


def distill_losses(
    student, teacher, x, heads, lam_kl=1.0, lam_msarc=1.0, temperature=4.0,
    autocast=contextlib.nullcontext()
):
    """Eq. (12) of a batch of images x (B, C, H, W) in [-1, 1]: {'kl', 'msarc'}, weighted; their sum
    is the loss.

    student and teacher are `WithMaps`; without lam_msarc their maps are not used. heads: the
    last linear layers of both.
    """
    with autocast:
        logits_S, maps_S = student(x)
    x.requires_grad_(lam_msarc > 0)  # else a frozen teacher builds no graph
    with torch.set_grad_enabled(lam_msarc > 0), autocast:
        logits_T, maps_T = teacher(x)
    terms = {'kl': lam_kl * kl_loss(logits_S.float(), logits_T.detach().float(), temperature)}
    if lam_msarc:
        terms['msarc'] = lam_msarc * msarc_loss(
            logits_S, maps_S, heads[0], logits_T, maps_T, heads[1]
        )
    return terms


def augment(x, crop=0, flip=False):
    """Random crops of uint8 images (B, C, H, H) padded by `crop` black pixels, and random
    horizontal flips."""
    B, H = len(x), x.shape[-1]
    device = x.device
    if crop:
        padded = F.pad(x, [crop] * 4)
        top, left = torch.randint(0, 2 * crop + 1, (2, B, 1), device=device)
        rows = top + torch.arange(H, device=device)
        cols = left + torch.arange(H, device=device)
        batch = torch.arange(B, device=device)[:, None, None]
        x = padded[batch, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        x = torch.where(torch.rand(B, 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
    return x.contiguous(memory_format=M.memory_format(device))


class WithMaps(torch.nn.Module):
    """A classifier with its preprocessing: images (B, C, H, W) in [-1, 1] -> (logits, maps). `maps`
    is None if they are not needed."""

    def __init__(self, net, maps=True):
        super().__init__()
        self.net = net
        self.maps = maps

    def forward(self, images):
        x = M.preprocess(self.net, images)  # each network's own size and normalisation
        return M.forward_features(self.net, x) if self.maps else (self.net(x), None)


# ==== building and checking ====
def build_classifier(spec, num_classes, in_channels, image_size, **kw):
    """A classifier with random weights: a name (`models.classifier`) or a Python file, whose
    build() is called."""
    size = dict(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    if spec.endswith('.py'):
        return M.adapter('classifiers').complete(M.build_from_file(spec, **size), spec)
    return M.classifier(spec, **size, **kw)


def check_origin(data, digest, teacher):
    """Raises UserError if synthesize.py made one of the shards in `data` for another teacher."""
    for f in image_sets.shards_of(data):
        with M.open_npz(f) as z:
            made = json.loads(str(z['settings'])) if 'settings' in z else {}
        if made.get('teacher_digest', digest) != digest:
            other = made['teacher']
            if other == teacher:
                other += ' with other weights'
            raise M.UserError(
                f'{f} was made for the teacher {other}, which is not {teacher}: use its own '
                'images, or --any_teacher=True'
            )


def linear_head(net, name):
    """The last linear layer of a classifier, whose weights make the class activation maps. Raises
    UserError if its input is more than the spatial mean of the last map."""
    side = net.image_size or 32
    x = torch.randn(2, net.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, maps = M.forward_features(net.eval(), x)
        linear = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
        layer = net.get_submodule(net.head_name) if hasattr(net, 'head_name') else linear[-1]
        fits = layer.in_features == maps[-1].shape[1]
        if fits:
            seen = layer(maps[-1].mean((2, 3)))
            fits = (seen - logits).abs().max() <= 1e-3 * (1 + logits.abs().max())
    if not fits:
        raise M.UserError(
            f'{name} has no class activation maps, because its last layer takes more than the mean '
            'of the last map: use --lam_msarc=0'
        )
    return layer


@torch.no_grad()
def predictions(net, images, device, autocast, rank=0, world=1):
    """The predicted class of each uint8 image, on the CPU. The ranks share the work, and each gets
    the whole result."""
    net.eval()
    found = torch.zeros(len(images), device=device)
    for i in range(rank * 500, len(images), world * 500):
        x = M.to_float(images[i : i + 500].to(device, memory_format=M.memory_format(device)))
        with autocast:
            found[i : i + 500] = net(M.preprocess(net, x)).argmax(1).float()
    if world > 1:
        dist.all_reduce(found)
    return found.long().cpu()


def agreement(a, b):
    return (a == b).float().mean().item()


# ==== set-up ====
if __name__ == '__main__':
    settings = {k: globals()[k] for k in _defaults}
    distilling = method == 'distill'
    M.check(
        lam_kl or lam_msarc or not distilling,
        'lam_kl=0 and lam_msarc=0 leave no loss to train with'
    )
    M.check(
        method != 'test' or test, "method='test' needs images: --test=mnist, an .npz or a folder"
    )
    M.check(
        temperature > 0 and holdout >= 0 and batch_size > 0 and epochs > 0,
        'temperature, batch_size and epochs must be above 0, holdout 0 or above'
    )
    dev, autocast, rank, world = M.init_distributed(device, dtype, seed)
    M.per_rank(batch_size, world)

    # ---- teacher ----
    net_T = None
    channels = 0  # keep the images' own
    if method != 'data':
        net_T = M.load_classifier(teacher, **teacher_config)
        channels = net_T.in_channels
    if distilling:
        settings['teacher_digest'] = M.digest(net_T)
        if not any_teacher:
            check_origin(data, settings['teacher_digest'], teacher)

    # ---- images ----
    images = labels = test_images = None
    if method != 'test':
        images, labels = M.load_images(data, image_size=image_size, channels=channels)
        if labels is None and method == 'data':
            raise M.UserError(f"{data} has no labels ('arr_1', or a subfolder per class)")
        M.check(
            method != 'data' or labels.min() < labels.max(),
            f'{data} has images of one class only: there is nothing to tell apart'
        )
        if len(images) - holdout < batch_size:
            raise M.UserError(
                f'{data} has {len(images)} images; holdout={holdout} leaves fewer than a batch of '
                f'{batch_size}: smaller ones, or more images'
            )
    name = image_sets.split_classes(data)[0]
    if test or not os.path.exists(name) and image_sets.torchvision_dataset(name):
        test_images, test_labels = M.load_images(
            test or data, False, image_size, channels or images.shape[1]
        )
        wanted = test_images.shape[1:] if images is None else images.shape[1:]
        classes = net_T.num_classes if net_T else int(labels.max()) + 1
        if test_labels is None or test_images.shape[1:] != wanted or test_labels.max() >= classes:
            raise M.UserError(
                f'{test or data}: test images need labels below {classes} and the shape '
                f'{tuple(wanted)}, they have {tuple(test_images.shape[1:])}'
            )
    if method != 'test' and test:
        names, test_names = image_sets.class_names(data), image_sets.class_names(test)
        M.check(
            not names or not test_names or names == test_names,
            f'{data} has the classes {names}, {test} has {test_names}'
        )
    if images is None:
        images = test_images

    # ---- student ----
    size = {}
    if net_T is not None:  # the teacher's size and normalisation
        size = dict(num_classes=net_T.num_classes, image_size=net_T.image_size or images.shape[-1])
        size |= {k: getattr(net_T, k, (0.5,)) for k in ('mean', 'std')}
    else:  # normalise the images to mean 0 and deviation 1
        pixels = images[:10000].float() / 255
        size = dict(
            num_classes=int(labels.max()) + 1, image_size=images.shape[-1],
            mean=pixels.mean((0, 2, 3)).tolist(),
            std=pixels.std((0, 2, 3)).clamp(min=1e-3).tolist()
        )
    if width and student.startswith('resnet'):
        size['width'] = width
    net = build_classifier(student, in_channels=images.shape[1], **size)
    heads = None
    if distilling and lam_msarc:
        heads = linear_head(net, student), linear_head(net_T, teacher)
    checkpoint = M.resume(settings, rank, net) if method != 'test' else None
    net = net.to(dev, memory_format=M.memory_format(dev))
    if net_T is not None:
        net_T = net_T.to(dev, memory_format=M.memory_format(dev))
    if net_T is not None and test_images is not None:
        accuracy_T = agreement(
            predictions(net_T, test_images, dev, autocast, rank, world), test_labels
        )
        if rank == 0:
            print(
                f'teacher {teacher}: test accuracy {100 * accuracy_T:.2f} % of '
                f'{len(test_images):,} images'
            )
    if method == 'test':
        M.finish()

    # held-out images choose the best epoch, so that test images do not; they are the same on all
    # ranks, for any number of ranks
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held, train = order[:holdout], order[holdout:]
    held_images = images[held]
    if distilling:
        held_labels = predictions(net_T, held_images, dev, autocast, rank, world)
    else:
        held_labels = labels[held]
    images = M.on_device(images, dev)
    home = images.device
    labels = None if distilling else labels.to(home)

    groups = [
        {'params': [p for p in net.parameters() if p.ndim > 1], 'weight_decay': weight_decay},
        # biases and BatchNorm
        {'params': [p for p in net.parameters() if p.ndim <= 1], 'weight_decay': 0.0},
    ]
    if optimizer == 'sgd':
        opt = torch.optim.SGD(groups, lr, momentum=0.9)
    else:
        opt = torch.optim.AdamW(groups, lr)
    if compile:  # stage by stage: Grad-CAM needs their maps
        torch._functorch.config.donated_buffer = False  # ... and runs backward through them twice
        torch._dynamo.config.cache_size_limit = 64  # counted over all stages together
        for network in (net, net_T):
            for name, module in network.named_modules() if network is not None else ():
                if isinstance(module, torch.nn.Sequential) and name.count('.') < 2:
                    module.compile()
    model = WithMaps(net, maps=lam_msarc > 0 and distilling)
    ask_teacher = WithMaps(net_T, maps=lam_msarc > 0)
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=student.endswith('.py')
        )
    if rank:
        torch.manual_seed(seed + rank)  # each rank draws its own crops
    steps_per_epoch = len(train) // batch_size
    epoch, first = 0, 0
    sums, best = {}, -1.0

    def save_checkpoint(step, finished=False):
        own = {'sums': sums}
        M.save_checkpoint(settings, step, net, opt, {'best': best}, own, rank, finished)

    if checkpoint:
        shared, own = M.restore(checkpoint, opt)
        epoch, first = divmod(shared['step'], steps_per_epoch)  # may be within an epoch
        sums = {k: v.to(dev) for k, v in own['sums'].items()}
        best = shared['best']
    else:
        M.set_aside(out_dir, rank)
        save_checkpoint(0, True)  # to resume from; another run may take its place
    if rank == 0:
        log = M.Log(os.path.join(out_dir, 'log.csv'), epoch)
        size = f'{sum(p.numel() for p in net.parameters()):,} parameters'
        if distilling:
            size += f', teacher {teacher}: {sum(p.numel() for p in net_T.parameters()):,}'
        print(
            f'{student}: {size}; {len(train):,} images of {tuple(images.shape[1:])}, '
            f'{net.num_classes} classes'
        )
    stop = M.StopFlag()

    # ==== the loop ====
    begin = time.time()
    row, leaving = {}, 0
    while epoch < epochs:
        net.train()
        g = torch.Generator().manual_seed(seed + epoch)  # the same order on all ranks
        order = train[torch.randperm(len(train), generator=g)]
        order = (
            order[: steps_per_epoch * batch_size].view(steps_per_epoch, world, -1)[:, rank].to(home)
        )
        for i in tqdm(
            range(first, steps_per_epoch), f'epoch {epoch + 1}/{epochs}', disable=rank > 0,
            leave=False
        ):
            if world == 1 or i % 20 == 0:
                leaving = M.all_reduce_max(stop.signal)
            if leaving:
                break
            done = epoch + i / steps_per_epoch
            scale = min(1.0, (done + 1 / steps_per_epoch) / warmup_epochs) if warmup_epochs else 1.0
            for group in opt.param_groups:
                group['lr'] = lr * scale * 0.5 * (1 + math.cos(math.pi * done / epochs))
            x = augment(images[order[i]].to(dev, non_blocking=True), augment_crop, augment_flip)
            x = M.to_float(x)
            if distilling:
                terms = distill_losses(
                    model, ask_teacher, x, heads, lam_kl, lam_msarc, temperature, autocast
                )
            else:
                y = labels[order[i]].to(dev, non_blocking=True)
                with autocast:
                    logits, _ = model(x)
                terms = {'ce': F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)}
            sum(terms.values()).backward()  # Eq. (12) if distilling
            opt.step()
            opt.zero_grad(set_to_none=True)
            for key, term in terms.items():
                sums[key] = sums.get(key, 0.0) + term.detach()
        if (~torch.stack([p.sum() for p in net.parameters()]).isfinite()).any():
            raise M.UserError(
                f'the weights are not finite in epoch {epoch + 1}: try a smaller --lr; the last '
                'checkpoint is intact'
            )
        if leaving:
            save_checkpoint(epoch * steps_per_epoch + i)
            break
        epoch += 1
        totals = torch.stack(list(sums.values())).tolist()
        means = {k: v / steps_per_epoch for k, v in zip(sums, totals)}
        first, sums = 0, {}
        row = dict(step=epoch, loss=sum(means.values()), **means)
        if holdout:
            row['agreement'] = agreement(
                predictions(net, held_images, dev, autocast, rank, world), held_labels
            )
        if test_images is not None:
            row['test_accuracy'] = agreement(
                predictions(net, test_images, dev, autocast, rank, world), test_labels
            )
        if rank == 0:
            print(
                f'epoch {epoch}: '
                + ', '.join(f'{k} {v:.4f}' for k, v in row.items() if k != 'step')
            )
            log(**row, lr=opt.param_groups[0]['lr'], seconds=log.seconds + time.time() - begin)
            M.save_model(net, os.path.join(out_dir, 'student.safetensors'))
            if holdout and row['agreement'] > best:
                M.save_model(net, os.path.join(out_dir, 'best.safetensors'))
        best = max(best, row.get('agreement', -1.0))
        save_checkpoint(epoch * steps_per_epoch, epoch == epochs)
    if rank == 0:
        path = os.path.join(out_dir, 'student.safetensors')
        if epoch:
            print(f'student: {path}, {time.time() - begin:.0f} s')
        else:
            print('stopped before the first epoch was complete')
        if 'test_accuracy' in row:
            of_teacher = f', of the teacher {100 * accuracy_T:.2f} %' if distilling else ''
            print(f"test accuracy of the student {100 * row['test_accuracy']:.2f} %{of_teacher}")
        elif epoch:
            spec = f'{student}:{path}' if student.endswith('.py') else path
            command = [
                'distill_classifier.py',
                '--method=test',
                f'--teacher={spec}',
                '--test=FOLDER',
            ]
            print(
                'test on a folder of labelled images, an .npz or a torchvision name: python '
                + shlex.join(command)
            )
    M.finish(leaving)
