# CIFAR-10 with Stable Diffusion 1.5 (Table I). Other teachers of the table: --teacher=cifar10_vgg11.pth, cifar10_wrn40_2.pth.
# The paper gives s, the steps, the number of images and keep; alpha, beta, gamma, eta and k are not in it and are ours,
# not tuned at this size.
teacher = 'cifar10_resnet34.pth'
teacher_source = 'the teachers that the README of github.com/zju-vipa/CMI links'
prior = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
guidance = 3.0
sampler = 'ddim'
steps = 10
num_images = 15000
keep = 4
keep_every = 2
lca_every = 2
batch_size = 16
out_dir = 'out/synth_cifar10'
