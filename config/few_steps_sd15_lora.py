# Stable Diffusion 1.5 in four evaluations instead of 48, as a LoRA, from a file of texts alone:
# python few_steps.py config/few_steps_sd15_lora.py --prompts=texts.txt
# python export.py --model=out/few_steps_sd15_lora/student.safetensors --out_dir=out/sd15_lora
# export.py prints the lines that load the result in diffusers. texts.txt has one prompt per line,
# like those that it will be used with. It needs peft: pip install peft
#
# Memory per card, counted: weights 1.6 GiB (bfloat16), adapters with gradients, average and
# optimiser 1.3, activations 1.6 for each of the 4 images of a pass (0.3 with
# --student_config.gradient_checkpointing=True), walks 1.3 (divided by the number of cards): about
# 11 GiB. Measured on a CPU only, with random weights of this size: 7.0 GiB for the whole process,
# in float32, one image of 64x64 latents, two steps, gradient_checkpointing. A checkpoint is
# 1.0 GiB, the LoRA 0.25. No number here has been tuned.
teacher = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
student = 'teacher'
lora_rank = 64
guidance = 7.5
jumps = 4
walks = 4096
walk_steps = 24
loss = 'l2'
max_steps = 4000
batch_size = 16
grad_accum = 4
lr = 1e-4
lr_warmup = 100
adamw = dict(beta2=0.999, weight_decay=0.0)
log_every = 20
save_every = 500
out_dir = 'out/few_steps_sd15_lora'
