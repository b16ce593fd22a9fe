# SDXL in four evaluations instead of 48, as a LoRA, from a file of texts alone:
# python few_steps.py config/few_steps_sdxl_lora.py --prompts=texts.txt
# python export.py --model=out/few_steps_sdxl_lora/student.safetensors --out_dir=out/sdxl_lora
# The rest is as in config/few_steps_sd15_lora.py.
#
# Memory per card, counted: weights 4.8 GiB (bfloat16), adapters with gradients, average and
# optimiser 3.7, activations of an image 0.7 and those of one block again (10.6 without
# gradient_checkpointing), walks 1.3 (divided by the number of cards): about 12 GiB. A checkpoint is
# 2.9 GiB, the LoRA 0.73. export.py takes 16 GiB of the host's memory.
#
# Measured on a CPU only, with random weights of this size, one walk, one image, one step, for the
# whole process: in bfloat16, latents of 32x32, 11 GiB in the step and 12.6 while it saves (that run
# was killed, resumed, exported and loaded by diffusers); in float32, latents of 128x128, 13.9 and
# 15.7 (with MALLOC_MMAP_THRESHOLD_=1048576: else glibc keeps what is freed, and it passed 21). No
# number here has been tuned.
teacher = 'stabilityai/stable-diffusion-xl-base-1.0'
student = 'teacher'
student_config = {'gradient_checkpointing': True}
lora_rank = 64
guidance = 7.0
jumps = 4
walks = 1024
walk_steps = 24
loss = 'l2'
max_steps = 4000
batch_size = 16
grad_accum = 16
lr = 1e-4
lr_warmup = 100
adamw = dict(beta2=0.999, weight_decay=0.0)
log_every = 20
save_every = 500
out_dir = 'out/few_steps_sdxl_lora'
