# CIFAR-100, resnet34 -> resnet18 (Table I), on the images of: synthesize.py config/synth_cifar100_sd15.py
# The paper gives the losses; the optimiser's numbers are ours.
data = 'out/synth_cifar100'
test = 'cifar100'
teacher = 'cifar100_resnet34.pth'
teacher_source = 'the teachers that the README of github.com/zju-vipa/CMI links'
teacher_config = dict(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
student = 'resnet18'
width = 0
augment_crop = 4
augment_flip = True
epochs = 200
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/cifar100_r34_r18'
