# ImageNet 256x256 with classes, DiT-XL/2 (675 M) -> DiT-S/2 (40 M in diffusers), guided; export.py
# makes a DiTPipeline of the result. No paper has this setting; the optimisation is that of DiT.
# python dkdm.py config/dkdm_dit_imagenet256.py
teacher = 'facebook/DiT-XL-2-256'
student = 'config/dit_s2_student.json'
student_prediction = 'teacher'
guidance = 1.5
uncond_prob = 0.1
max_steps = 400000
batch_size = 256
lr = 1e-4
lr_warmup = 0
lr_decay = False
adamw = dict(beta2=0.999, weight_decay=0.0)
ema = 0.9999
log_every = 100
save_every = 10000
sample_steps = 50
out_dir = 'out/dkdm_dit_imagenet256'
