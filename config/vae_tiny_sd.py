# A decoder and encoder of 2.4 M parameters, of TAESD's size, for the VAE of Stable Diffusion:
# python distill_vae.py config/vae_tiny_sd.py --data=folder/
# The images may be synthetic. In diffusers it stands in the VAE's place:
# vae = AutoencoderTiny.from_pretrained('out/vae_tiny_sd/student')
# DiffusionPipeline.from_pretrained(..., vae=vae)
# Run with tiny networks only; the numbers are guesses.
teacher = 'stabilityai/sd-vae-ft-mse'
student = 'config/taesd_student.json'
method = 'synthetic'
features = 'torchvision:resnet18'
max_steps = 100000
batch_size = 16
lr = 1e-3
weight_decay = 0.0
grad_clip = 1.0
flip = True
log_every = 100
save_every = 5000
out_dir = 'out/vae_tiny_sd'
