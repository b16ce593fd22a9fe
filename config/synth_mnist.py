# The defaults of synthesize.py, written out: digits from the bundled models, on any machine.
teacher = 'pretrained/mnist_resnet.safetensors'
prior = 'pretrained/mnist_unet.safetensors'
sampler = 'ddpm'
steps = 25
alpha = 0.3
beta = 1.0
eta = 3.0
lca_every = 8
num_images = 6000
keep = 4
keep_every = 2
batch_size = 100
out_dir = 'out/synth'
