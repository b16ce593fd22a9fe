"""
Trains an image classifier: from scratch on labelled images (`method='data'`), which is how the teachers of DiffDFKD
are made.

    python distill_classifier.py --data=mnist                       # a small ResNet on MNIST, downloaded
    python distill_classifier.py --data=train.npz --test=test.npz   # ADM-style .npz files, or image folders
    torchrun --nproc_per_node=8 distill_classifier.py --data=cifar10 --student=resnet34 --batch_size=512
"""
import os
import time

# images
data = 'mnist'               # an .npz, a folder of shards or of images, or a torchvision name (downloaded)
test = ''                    # images to test on; '' is the test split of a torchvision name, else no test
augment_crop = 2             # random crops from images padded by so many pixels; 0 for none
augment_flip = False         # random horizontal flips
# student
method = 'data'              # 'data': cross-entropy on the labels
student = 'resnet14'         # resnet8, 14 ... 110, resnet18/34/50, wrn16_1 ... wrn40_2, vgg11 ... vgg19
width = 0                    # channels of the first stage of a ResNet; 0 is its usual width
# optimisation
epochs = 12
batch_size = 128             # over all ranks
optimizer = 'sgd'            # 'sgd' (momentum 0.9) or 'adamw'
lr = 0.1                     # cosine decay to 0
warmup_epochs = 1            # linear warm-up
weight_decay = 5e-4
label_smoothing = 0.0
# system
out_dir = 'out/classifier'
init_from = 'scratch'        # 'scratch' or 'resume'
seed = 0
device = 'auto'              # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'               # 'auto', 'bfloat16', 'float32'
compile = False              # torch.compile, for GPUs
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import models as M

# ---- check everything before any work starts ----
if method != 'data':
    M.die(f"method={method!r}: 'data'")
if optimizer not in ('sgd', 'adamw'):
    M.die(f"optimizer={optimizer!r}: 'sgd' or 'adamw'")
if init_from not in ('scratch', 'resume'):
    M.die(f"init_from={init_from!r}: 'scratch' or 'resume'")
device, autocast, rank, world = M.start(device, dtype, seed)
if batch_size < world or batch_size % world:
    M.die(f'batch_size={batch_size} is shared by {world} ranks: a multiple of {world}')
try:
    images, labels = M.load_images(data)
    is_name = not (data.endswith('.npz') or os.path.isdir(data))
    test_images, test_labels = M.load_images(test or data, train=False) if test or is_name else (None, None)
    if labels is None:
        raise ValueError(f"{data} has no labels ('arr_1', or a subfolder per class)")
    if len(images) < batch_size:
        raise ValueError(f'{data} has {len(images)} images, fewer than batch_size={batch_size}')
    if test_images is not None and (test_labels is None or test_images.shape[1:] != images.shape[1:]):
        raise ValueError(f'{test or data}: test images are {tuple(test_images.shape[1:])}, with labels '
                         f'{test_labels is not None}; the training images {tuple(images.shape[1:])}')
    if images.shape[2] != images.shape[3]:
        raise ValueError(f'{data}: images must be square, they are {images.shape[2]}x{images.shape[3]}')
    num_classes = int(labels.max()) + 1
    # the network sees images whose channels have mean 0 and deviation 1
    pixels = images[:10000].float() / 255
    kw = {'width': width} if width else {}
    net = M.classifier(student, num_classes, image_size=images.shape[-1], in_channels=images.shape[1],
                       mean=pixels.mean((0, 2, 3)).tolist(), std=pixels.std((0, 2, 3)).clamp(min=1e-3).tolist(), **kw)
    checkpoint = M.load_checkpoint(out_dir, rank) if init_from == 'resume' else None
except ValueError as e:
    M.die(str(e))

net = net.to(device, memory_format=M.memory_format(device))
decay = [p for p in net.parameters() if p.ndim > 1]                            # no decay of biases and BatchNorm
groups = [{'params': decay, 'weight_decay': weight_decay},
          {'params': [p for p in net.parameters() if p.ndim <= 1], 'weight_decay': 0.}]
opt = torch.optim.SGD(groups, lr, momentum=0.9) if optimizer == 'sgd' else torch.optim.AdamW(groups, lr)
model = torch.compile(net) if compile else net
if world > 1:
    model = torch.nn.parallel.DistributedDataParallel(model)
if rank:
    torch.manual_seed(seed + rank)                                             # crops of its own for every rank
epoch = 0
if checkpoint:
    shared, own = checkpoint
    net.load_state_dict(shared['net'])
    opt.load_state_dict(shared['opt'])
    epoch = shared['step']
    M.set_random_state(own, device)
os.makedirs(out_dir, exist_ok=True)
log = M.Log(os.path.join(out_dir, 'log.csv'), epoch) if rank == 0 else None
stop = M.stop_flag()
if rank == 0:
    print(f'{student}: {sum(p.numel() for p in net.parameters()):,} parameters; {len(images):,} images of '
          f'{tuple(images.shape[1:])}, {num_classes} classes')


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
def accuracy():
    net.eval()
    hits = 0
    for i in range(rank * 500, len(test_images), world * 500):
        x = M.to_float(test_images[i:i + 500]).to(device, memory_format=M.memory_format(device))
        with autocast:
            hits += (net(M.preprocess(net, x)).argmax(1).cpu() == test_labels[i:i + 500]).sum().item()
    return M.on_all(dist.ReduceOp.SUM, hits, device) / len(test_images)


# ---- the loop ----
steps_per_epoch = len(images) // batch_size
t0 = time.time()
while epoch < epochs:
    net.train()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + epoch))   # the same on all ranks
    order = order[:steps_per_epoch * batch_size].view(steps_per_epoch, world, -1)[:, rank]
    bar = tqdm(order, desc=f'epoch {epoch + 1}/{epochs}', disable=rank > 0, leave=False, mininterval=1)
    total = 0.
    for i, idx in enumerate(bar):
        done = epoch + i / steps_per_epoch
        scale = min(1., (done + 1 / steps_per_epoch) / warmup_epochs) if warmup_epochs else 1.
        for g in opt.param_groups:
            g['lr'] = lr * scale * 0.5 * (1 + math.cos(math.pi * done / epochs))
        x, y = augment(M.to_float(images[idx])), labels[idx].to(device)
        with autocast:
            logits = model(M.preprocess(net, x.to(device, memory_format=M.memory_format(device))))
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
        loss.backward()
        if not torch.isfinite(loss):
            M.die(f'the loss is {loss.item()} in epoch {epoch + 1}: a smaller --lr; the last checkpoint is untouched')
        opt.step()
        opt.zero_grad(set_to_none=True)
        total += loss.item()
        if i % 20 == 0:
            bar.set_postfix(loss=f'{loss.item():.3f}')
        if M.on_all(dist.ReduceOp.MAX, len(stop), device):
            break
    if M.on_all(dist.ReduceOp.MAX, len(stop), device):
        break                                                                  # the checkpoint of the last epoch stands
    epoch += 1
    acc = accuracy() if test_images is not None else float('nan')
    if rank == 0:
        print(f'epoch {epoch}: loss {total / steps_per_epoch:.4f}, test accuracy {100 * acc:.2f} %')
        log(step=epoch, loss=total / steps_per_epoch, test_accuracy=acc, lr=opt.param_groups[0]['lr'],
            seconds=time.time() - t0)
        M.save_model(net, os.path.join(out_dir, 'student.safetensors'))
    M.save_checkpoint(out_dir, epoch, {'net': net.state_dict(), 'opt': opt.state_dict()},
                      M.random_state(device), rank)
if rank == 0:
    print(f'classifier: {out_dir}/student.safetensors' if epoch else 'stopped before the first epoch was complete')
if world > 1:
    dist.destroy_process_group()
