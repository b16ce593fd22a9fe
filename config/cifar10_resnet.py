# The feature space of the CIFAR-10 distances, pretrained/cifar10_resnet.safetensors: a ResNet-20.
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
