# CIFAR-100 with Stable Diffusion 1.5 (Table I). The other teacher of the table: --teacher=cifar100_vgg11.pth.
# The paper gives s, the steps, the number of images and keep; alpha, beta, gamma, eta and k are not in it and are ours,
# not tuned at this size.
teacher = 'cifar100_resnet34.pth'
teacher_source = 'the teachers that the README of github.com/zju-vipa/CMI links'
teacher_config = dict(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
prior = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
guidance = 3.0
sampler = 'ddim'
steps = 10
num_images = 15000
keep = 4
keep_every = 2
lca_every = 2
batch_size = 16
out_dir = 'out/synth_cifar100'
