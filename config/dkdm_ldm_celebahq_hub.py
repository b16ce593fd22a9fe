# CelebA-HQ 256x256 in latents: dkdm_celebahq256_ldm.py with the copy of its teacher that diffusers
# loads from the hub, and with our walk (stride 40) and clipped gradients. Pictures and evaluation
# are decoded by the teacher's VQ-VAE.
# python dkdm.py config/dkdm_ldm_celebahq_hub.py
teacher = 'CompVis/ldm-celebahq-256'
student_prediction = 'teacher'
student_config = dict(learn_sigma=False, patch_size=1, model_channels=128, num_res_blocks=2,
                      channel_mult=(1, 2, 3, 4), attention_resolutions=(32, 16, 8), resblock_updown=False,
                      use_scale_shift_norm=False, use_new_attention_order=False)
max_steps = 640000
batch_size = 48
lr = 9.6e-5
lr_warmup = 0
lr_decay = False
adamw = dict(beta2=0.999, weight_decay=0.01)
ema = 0.9999
log_every = 100
save_every = 10000
sample_steps = 200
out_dir = 'out/dkdm_ldm_celebahq'
