# Digits for the encoder of a VAE, pulled towards what the bundled one reconstructs well and expects: the loss is its
# negative ELBO per pixel (alpha : beta = 1 : 1 / 0.1).
teacher = 'vae:pretrained/mnist_lvae.safetensors'
prior = 'pretrained/mnist_unet.safetensors'
alpha = 1.0
beta = 10.0
eta = 100.0
lca = 'none'
keep = 1
num_images = 1000
out_dir = 'out/synth_vae'
