# CIFAR-100 with Stable Diffusion 1.5 (Table I), for the ResNet-34; the command for the VGG-11 is in
# config/distill_cifar100_vgg11_r18.py.
# The checkpoints that the README of github.com/zju-vipa/CMI links do as well: --teacher=cifar100_resnet34.pth
# --teacher_config="{'mean': (0.5071, 0.4867, 0.4408), 'std': (0.2675, 0.2565, 0.2761)}"
# From the paper: s, the steps, the number of images, four of each walk. 15,000 is read as the images that are kept,
# of 3,750 walks; the other reading is --num_images=60000. From the authors' option files: alpha, beta, eta (gamma is
# 0 or 1 there, and counts once there is a --student). keep_every and k are in neither and are ours. Not tuned, not
# run at this size.
teacher = 'out/teacher_cifar100_r34/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar100_r34.py
prior = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
guidance = 3.0
sampler = 'ddpm'
steps = 10
edit = 'paper'
alpha = 0.1
beta = 1.0
gamma = 1.0
eta = 1.0
lca_every = 2
num_images = 15000
keep = 4
keep_every = 2
batch_size = 16
grad_batch = 4
out_dir = 'out/synth_cifar100_r34'
