# A CelebA-HQ teacher at 64x64, six levels: python distill_vae.py config/vae_celebahq_teacher.py, with the
# images, resized to 64x64, in the folder celebahq64 (no torchvision dataset has them).
method = 'data'
data = 'celebahq64'
student_config = {'width': 128}
flip = True
max_steps = 40000
save_every = 1000
batch_size = 128
lr = 1e-3
kl_warmup = 1000
out_dir = 'out/vae_celebahq_teacher'
