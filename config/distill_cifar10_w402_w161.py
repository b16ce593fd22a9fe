# CIFAR-10, wrn40_2 -> wrn16_1 (Table I), on the images of: synthesize.py config/synth_cifar10_sd15.py --teacher=cifar10_wrn40_2.pth
# The paper gives the losses; the optimiser's numbers are ours.
data = 'out/synth_cifar10'
test = 'cifar10'
teacher = 'cifar10_wrn40_2.pth'
teacher_source = 'the teachers that the README of github.com/zju-vipa/CMI links'
student = 'wrn16_1'
width = 0
augment_crop = 4
augment_flip = True
epochs = 200
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/cifar10_w402_w161'
