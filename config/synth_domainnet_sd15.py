# Clipart of DomainNet, its first ten classes, with Stable Diffusion 1.5 (Table II). Another domain:
# --teacher=out/teacher_domainnet_r34_sketch/student.safetensors --out_dir=out/synth_domainnet_r34_sketch
# QuickDraw, where the paper has s = 7.5 and 70 steps: --guidance=7.5 --steps=70 --keep_every=10 --lca_every=10 as well
# From the paper: s, the steps, the number of images, four of each walk. 12,000 is read as the images that are kept,
# of 3,000 walks; the other reading is --num_images=48000. From the authors' option files: alpha, beta, eta (gamma is
# 0 or 1 there, and counts once there is a --student). keep_every and k are in neither and are ours. Not tuned, not
# run at this size.
teacher = 'out/teacher_domainnet_r34/student.safetensors'
# made by: python distill_classifier.py config/teacher_domainnet_r34.py
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
num_images = 12000
keep = 4
keep_every = 2
batch_size = 16
grad_batch = 4
out_dir = 'out/synth_domainnet_r34'
