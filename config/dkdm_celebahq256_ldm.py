# The paper's CelebA-HQ 256x256 setting (Table 3), on 64x64x3 latents: 274 M teacher, 90 M student,
# L_simple only. And its FFHQ 256x256 setting, whose teacher is the model.ckpt of "FFHQ 256x256
# LDM-VQ-4" of the same page:
# python dkdm.py config/dkdm_celebahq256_ldm.py
# python dkdm.py config/dkdm_celebahq256_ldm.py --teacher=ffhq_256.ckpt --batch_size=42 --lr=8.4e-5 --out_dir=out/dkdm_ffhq256_ldm
teacher = 'celebahq_256.ckpt'
# teacher: the model.ckpt of "CelebA-HQ 256x256 LDM-VQ-4", linked from the README of github.com/CompVis/latent-diffusion
teacher_config = dict(image_size=64, num_head_channels=32, schedule='sqrt_linear',
                      beta_range=(0.0015, 0.0195), clip=False)
student_prediction = 'teacher'
student_config = dict(learn_sigma=False, patch_size=1, model_channels=128, num_res_blocks=2,
                      channel_mult=(1, 2, 3, 4), attention_resolutions=(32, 16, 8), num_head_channels=32,
                      resblock_updown=False, use_scale_shift_norm=False,
                      use_new_attention_order=False)
rho = 0.004                  # 4 batches, as in the authors' settings for latents
stride = 1
warmup_steps = 1000
lam = 0.0
max_steps = 640000
batch_size = 48
lr = 9.6e-5
lr_warmup = 0
lr_decay = False
adamw = dict(beta2=0.999, weight_decay=0.01)
grad_clip = 0.0
ema = 0.9999
log_every = 100
save_every = 10000
sample_steps = 200
compile = True
out_dir = 'out/dkdm_celebahq256_ldm'
