# The slides' CelebA-HQ student: 50 epochs on the 1,000 images of config/synth_celebahq_vae_sd15.py, Adam at 1e-4.
teacher = 'out/vae_celebahq_teacher/student.safetensors'
# made by: python distill_vae.py config/vae_celebahq_teacher.py
method = 'synthetic'
data = 'out/synth_celebahq_vae'
max_steps = 391
lr = 1e-4
lr_decay = False
batch_size = 128
out_dir = 'out/vae_celebahq_slides'
