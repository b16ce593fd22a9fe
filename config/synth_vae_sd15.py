# The slides' images for a VAE: 1,000 from Stable Diffusion 1.5, guided by reconstruction error and
# posterior KL. For the VAEs of CIFAR-10 and of CelebA-HQ:
# python synthesize.py config/synth_vae_sd15.py
# python synthesize.py config/synth_vae_sd15.py --teacher=vae:out/vae_celebahq64_teacher/student.safetensors --class_names=faces --out_dir=out/synth_vae_celebahq64
# The slides give neither weights nor steps. Those here are ours and are not tuned at this size.
teacher = 'vae:out/vae_cifar10_teacher/student.safetensors'
# made by: python distill_vae.py config/vae_cifar10_teacher.py
prior = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
class_names = 'cifar10'
guidance = 7.5
sampler = 'ddpm'
steps = 50
edit = 'paper'
alpha = 1.0
beta = 10.0
eta = 100.0
lca = 'none'
keep = 1
batch_size = 8
grad_batch = 4
num_images = 1000
out_dir = 'out/synth_vae_cifar10'
