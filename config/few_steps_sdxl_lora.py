# SDXL in four evaluations instead of 48, as a LoRA, from a file of texts alone:
# python few_steps.py config/few_steps_sdxl_lora.py --prompts=texts.txt
# python export.py --model=out/few_steps_sdxl_lora/student.safetensors --out_dir=out/sdxl_lora
# The rest is as in config/few_steps_sd15_lora.py.
#
# Memory per card, counted and not measured: weights 4.8 GiB (bfloat16), adapters with gradients,
# average and optimiser 3.7, activations of an image 0.7 and those of one block again (10.6 without
# gradient_checkpointing), walks 1.3 (divided by the number of cards): about 12 GiB. No step was run
# at this size, only counted; tiny pipelines with random weights run in the tests.
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
