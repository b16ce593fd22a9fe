# The slides' images for a VAE: 1,000 from Stable Diffusion 1.5, guided by reconstruction error and
# posterior KL. The settings are those of the slides' repository for CIFAR-10, in which the losses
# are sums over an image: a weight of 1 there is 3 * 32 * 32 here, where they are means over its
# values. For the ladder VAEs of the slides' tables, of CIFAR-10 and of CelebA-HQ, and for the plain
# VAE of the repository:
# python synthesize.py config/synth_vae_sd15.py
# python synthesize.py config/synth_vae_sd15.py --teacher=vae:out/vae_celebahq64_teacher/student.safetensors --class_names=faces --alpha=12288.0 --beta=12288.0 --out_dir=out/synth_vae_celebahq64
# python synthesize.py config/synth_vae_sd15.py --teacher=vae:adapters/plain_vae.py:out/vae_cifar10_plain/student.safetensors --out_dir=out/synth_vae_cifar10_plain
# Ours, with more steps, eight walks at once and the weights of the negative ELBO for beta = 0.1:
# python synthesize.py config/synth_vae_sd15.py --guidance=7.5 --steps=50 --alpha=1.0 --beta=10.0 --eta=12.5 --batch_size=8 --reevaluate=False --out_dir=out/synth_vae_cifar10_ours
# Neither is tuned, or has been run at this size.
teacher = 'vae:out/vae_cifar10_teacher/student.safetensors'
# made by: python distill_vae.py config/vae_cifar10_teacher.py
prior = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
class_names = 'cifar10'
guidance = 3.0
sampler = 'ddpm'
steps = 5
edit = 'paper'
alpha = 3072.0
beta = 3072.0
eta = 1.0
reevaluate = True
lca = 'none'
keep = 1
batch_size = 1
num_images = 1000
out_dir = 'out/synth_vae_cifar10'
