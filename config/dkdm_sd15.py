# Text to image, Stable Diffusion 1.5 (860 M) -> a U-Net of 212 M, guided; export.py makes a
# StableDiffusionPipeline of the result. The file of texts has one prompt per line, like those
# that the student will be used with. No paper has this setting.
# python dkdm.py config/dkdm_sd15.py --prompts=texts.txt
teacher = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
student = 'config/sd15_student.json'
student_prediction = 'teacher'
guidance = 7.5
uncond_prob = 0.1
max_steps = 200000
batch_size = 64
grad_accum = 2
lr = 1e-4
lr_warmup = 500
lr_decay = False
adamw = dict(beta2=0.999, weight_decay=0.0)
ema = 0.9999
log_every = 100
save_every = 5000
sample_steps = 50
out_dir = 'out/dkdm_sd15'
