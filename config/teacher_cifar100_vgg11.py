# The CIFAR-100 VGG-11 of Table I: python distill_classifier.py config/teacher_cifar100_vgg11.py
# Table I has 71.32 % on the test images, of a checkpoint that others published.
method = 'data'
data = 'cifar100'
holdout = 0
student = 'vgg11'
width = 0
augment_crop = 4
augment_flip = True
epochs = 200
batch_size = 128
lr = 0.1
weight_decay = 5e-4
out_dir = 'out/teacher_cifar100_vgg11'
