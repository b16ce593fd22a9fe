# CIFAR-10 with a text prior on pixels (Table III: 3,000 images, ResNet-34 to ResNet-18).
# The paper has GLIDE, of which there is no maintained package. In its place: the first stage of DeepFloyd IF, 64x64,
# where x_0 is clamped and not thresholded dynamically. The number of images is the paper's; the rest is that of
# config/synth_cifar10_sd15.py.
teacher = 'out/teacher_cifar10_r34/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar10_r34.py
prior = 'DeepFloyd/IF-I-M-v1.0'
guidance = 3.0
sampler = 'ddpm'
steps = 10
edit = 'paper'
alpha = 0.1
beta = 1.0
gamma = 1.0
eta = 1.0
lca_every = 2
num_images = 3000
keep = 4
keep_every = 2
batch_size = 16
grad_batch = 4
out_dir = 'out/synth_cifar10_if'
