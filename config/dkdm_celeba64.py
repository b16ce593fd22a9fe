# The paper's CelebA 64x64 setting (Table 2): 295 M teacher, 57 M student, batch 256 on four GPUs.
# torchrun --nproc_per_node=4 dkdm.py config/dkdm_celeba64.py
teacher = 'celeba_64.pt'
# teacher: DDPM_IP_celeba64.pt, linked from the README of github.com/forever208/DDPM-IP
teacher_config = dict(image_size=64, num_head_channels=64)
student_prediction = 'teacher'
student_config = dict(patch_size=1, model_channels=96, num_res_blocks=2, channel_mult=(1, 2, 3, 4),
                      attention_resolutions=(32, 16, 8), num_head_channels=32, dropout=0.1)
rho = 0.4
stride = 1
warmup_steps = 1000
lam = 0.001
# of the Data-Free Training baseline (Table 4), --method=synthetic
synthetic = dict(number=202599, steps=100)
max_steps = 200000
batch_size = 256
lr = 1e-4
lr_warmup = 0
lr_decay = False
adamw = dict(beta2=0.999, weight_decay=0.0)
grad_clip = 0.0
ema = 0.9999
log_every = 100
save_every = 10000
sample_steps = 50
compile = True
out_dir = 'out/dkdm_celeba64'
