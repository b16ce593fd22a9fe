# The slides' images for the CelebA-HQ VAE: 1,000 of Stable Diffusion 1.5, guided by reconstruction error and
# posterior KL. The slides give neither weights nor steps: those of the guidance are ours, not tuned at this
# size.
teacher = 'vae:out/vae_celebahq_teacher/student.safetensors'
# made by: python distill_vae.py config/vae_celebahq_teacher.py
prior = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
class_names = 'faces'
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
out_dir = 'out/synth_celebahq_vae'
