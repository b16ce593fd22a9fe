# Digits for the encoder of a VAE, pulled towards what the bundled VAE reconstructs well and
# expects. The loss is the VAE's negative ELBO per pixel (alpha : beta = 1 : 1 / 0.1).
# python synthesize.py config/synth_mnist_vae.py
teacher = 'vae:pretrained/mnist_lvae.safetensors'
prior = 'pretrained/mnist_unet.safetensors'
alpha = 1.0
beta = 10.0
eta = 100.0
lca = 'none'
keep = 1
num_images = 1000
out_dir = 'out/synth_vae'
