# CIFAR-10, WRN-40-2 to WRN-16-2 (Table I), on the images of:
# python synthesize.py config/synth_cifar10_sd15.py --teacher=out/teacher_cifar10_w402/student.safetensors --out_dir=out/synth_cifar10_w402
# From the paper: the losses. From the authors' option files: the temperature, SGD's lr and weight decay, the batch,
# 240 epochs of a cosine with warm-up, whose length is ours. The weights of the losses are SpaceshipNet's.
data = 'out/synth_cifar10_w402'
test = 'cifar10'
teacher = 'out/teacher_cifar10_w402/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar10_w402.py
student = 'wrn16_2'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 4
augment_flip = True
epochs = 240
warmup_epochs = 20
batch_size = 256
lr = 0.2
weight_decay = 5e-4
out_dir = 'out/cifar10_w402_w162'
