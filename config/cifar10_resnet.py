# The classifier in whose features distances on CIFAR-10 are measured,
# pretrained/cifar10_resnet.safetensors: a ResNet-20.
# python distill_classifier.py config/cifar10_resnet.py --test=cifar10
method = 'data'
data = 'cifar10'
student = 'resnet20'
width = 16
holdout = 0
augment_crop = 4
augment_flip = True
epochs = 30
batch_size = 128
lr = 0.2
weight_decay = 5e-4
out_dir = 'out/cifar10_resnet'
