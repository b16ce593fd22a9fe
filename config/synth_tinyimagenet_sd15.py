# Tiny-ImageNet with Stable Diffusion 1.5 (Table I).
# From the paper: s, the steps, the number of images, four of each walk. 30,000 is read as the images that are kept,
# of 7,500 walks; the other reading is --num_images=120000. From the authors' option files: alpha, beta, eta (gamma is
# 0 or 1 there, and counts once there is a --student). keep_every and k are in neither and are ours. Not tuned, not
# run at this size.
teacher = 'out/teacher_tinyimagenet_r34/student.safetensors'
# made by: python distill_classifier.py config/teacher_tinyimagenet_r34.py
prior = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
guidance = 3.0
sampler = 'ddpm'
steps = 10
edit = 'paper'
alpha = 0.1
beta = 1.0
gamma = 1.0
eta = 1.0
lca_every = 2
num_images = 30000
keep = 4
keep_every = 2
batch_size = 16
grad_batch = 4
out_dir = 'out/synth_tinyimagenet_r34'
