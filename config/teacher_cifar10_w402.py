# The CIFAR-10 WRN-40-2 of Table I: python distill_classifier.py config/teacher_cifar10_w402.py
# Table I has 94.87 % on the test images, of a checkpoint that others published.
method = 'data'
data = 'cifar10'
holdout = 0
student = 'wrn40_2'
width = 0
augment_crop = 4
augment_flip = True
epochs = 200
batch_size = 128
lr = 0.1
weight_decay = 5e-4
out_dir = 'out/teacher_cifar10_w402'
