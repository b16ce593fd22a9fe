# The paper's CIFAR-10 setting (Table 2): 57 M teacher, 14 M student, batch 128, 200k steps on one
# GPU. And its ImageNet 32x32 setting, batch 512 on four GPUs, whose teacher is
# DDPM_IP_imageNet32.pt of the same page:
# python dkdm.py config/dkdm_cifar10.py
# torchrun --nproc_per_node=4 dkdm.py config/dkdm_cifar10.py --teacher=imagenet_32.pt --batch_size=512 --synthetic.number=1281167 --synthetic.steps=100 --out_dir=out/dkdm_imagenet32
teacher = 'cifar10_32.pt'
# teacher: ADM_cifar10_baseline.pt, linked from the README of github.com/forever208/DDPM-IP
teacher_config = dict(image_size=32, num_head_channels=32)
student_prediction = 'teacher'
# the student of Figure 4's ablations is of the teacher's size: model_channels=128
student_config = dict(patch_size=1, model_channels=64, num_res_blocks=3, channel_mult=(1, 2, 2, 2),
                      attention_resolutions=(16, 8), num_head_channels=32, dropout=0.3)
rho = 0.4
stride = 1
warmup_steps = 1000
lam = 0.001
# of the Data-Free Training baseline (Table 4), --method=synthetic
synthetic = dict(number=50000, steps=1000)
max_steps = 200000
batch_size = 128
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
out_dir = 'out/dkdm_cifar10'
