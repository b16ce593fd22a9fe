# One domain of DomainNet, its first ten classes, with Stable Diffusion 1.5 (Table II).
# QuickDraw: --guidance=7.5 --steps=70 --keep_every=10 --lca_every=10
# The paper gives s, the steps, the number of images and keep; alpha, beta, gamma, eta and k are not in it and are ours,
# not tuned at this size.
teacher = 'domainnet_resnet34.safetensors'
teacher_source = 'it by training: python distill_classifier.py --method=data --data=FOLDER --student=torchvision:resnet34 --out_dir=...; the paper has none to download'
prior = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
guidance = 3.0
sampler = 'ddim'
steps = 10
num_images = 12000
keep = 4
keep_every = 2
lca_every = 2
batch_size = 16
out_dir = 'out/synth_domainnet'
