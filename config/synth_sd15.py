# Images from Stable Diffusion 1.5 for DiffDFKD's tables. CIFAR-10, for the ResNet-34 (Table I):
# python synthesize.py config/synth_sd15.py
# CIFAR-10, for the VGG-11 and for the WRN-40-2:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_cifar10_vgg11/student.safetensors --out_dir=out/synth_cifar10_vgg11
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_cifar10_wrn40_2/student.safetensors --out_dir=out/synth_cifar10_wrn40_2
# CIFAR-100, for the ResNet-34 and for the VGG-11:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_cifar100/student.safetensors --out_dir=out/synth_cifar100
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_cifar100_vgg11/student.safetensors --out_dir=out/synth_cifar100_vgg11
# Tiny-ImageNet:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_tinyimagenet/student.safetensors --num_images=30000 --out_dir=out/synth_tinyimagenet
# DomainNet, ten classes (Table II): Clipart, Sketch, and QuickDraw, where the paper has s
# = 7.5 and 70 steps:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_domainnet/student.safetensors --num_images=12000 --out_dir=out/synth_domainnet
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_domainnet_sketch/student.safetensors --num_images=12000 --out_dir=out/synth_domainnet_sketch
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_domainnet_quickdraw/student.safetensors --num_images=12000 --guidance=7.5 --steps=70 --keep_every=14 --lca_every=14 --out_dir=out/synth_domainnet_quickdraw
# Other priors (Table III, 3,000 images for the ResNet-34): Stable Diffusion; DiT-XL/2, whose
# ImageNet classes are drawn at random; the first stage of DeepFloyd IF, 64x64, where x_0 is clamped
# and not thresholded dynamically. The paper uses GLIDE instead, for which there is no maintained
# package.
# python synthesize.py config/synth_sd15.py --num_images=3000 --out_dir=out/sd15_cifar10
# python synthesize.py config/synth_sd15.py --prior=facebook/DiT-XL-2-256 --num_images=3000 --out_dir=out/dit_cifar10
# python synthesize.py config/synth_sd15.py --prior=DeepFloyd/IF-I-M-v1.0 --num_images=3000 --out_dir=out/if_cifar10
# Unguided images with the same prompts, DM-KD (Table I):
# python synthesize.py config/synth_sd15.py --eta=0 --lca=none --out_dir=out/dmkd_cifar10
# A checkpoint that the README of github.com/zju-vipa/CMI links is a teacher as well. Those of
# CIFAR-100 need their statistics:
# python synthesize.py config/synth_sd15.py --teacher=cifar10_resnet34.pth
# python synthesize.py config/synth_sd15.py --teacher=cifar100_resnet34.pth --teacher_config="{'mean': (0.5071, 0.4867, 0.4408), 'std': (0.2675, 0.2565, 0.2761)}" --out_dir=out/synth_cifar100
#
# The scale s, the steps, the number of images and four images of each walk are the paper's. Its
# 15,000 images are read as the images that are kept, of 3,750 walks; if they are the walks,
# --num_images=60000 is right. alpha, beta, eta, keep_every and lca_every are those of the published
# code, which its authors wrote again from memory: gamma is 0 or 1 there, and counts only with a
# --student; both intervals are steps // 5, so 2 for 10 steps, 10 for 50 and 14 for 70. That code
# makes one image at a time, so L_bn is over one image and CutMix has no partner; it also evaluates
# the denoiser again after the edit and after an augmentation:
# python synthesize.py config/synth_sd15.py --batch_size=1 --lca=none --reevaluate=True --out_dir=out/single_cifar10
# Nothing of this is tuned, or has been run at this size.
teacher = 'out/teacher_cifar10/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar10.py
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
out_dir = 'out/synth_cifar10'
