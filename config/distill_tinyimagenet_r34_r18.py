# Tiny-ImageNet, ResNet-34 to ResNet-18 (Table I), on the images of:
# python synthesize.py config/synth_tinyimagenet_sd15.py
# From the paper: the losses. From the authors' option files: the temperature, SGD's lr and weight decay, the batch,
# 240 epochs of a cosine with warm-up, whose length is ours. The weights of the losses are SpaceshipNet's.
data = 'out/synth_tinyimagenet_r34'
test = 'tiny-imagenet-200/val'
teacher = 'out/teacher_tinyimagenet_r34/student.safetensors'
# made by: python distill_classifier.py config/teacher_tinyimagenet_r34.py
student = 'resnet18'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 8
augment_flip = True
epochs = 240
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/tinyimagenet_r34_r18'
