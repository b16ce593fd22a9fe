# The bundled MNIST VAE, pretrained/mnist_lvae.safetensors:
# python distill_vae.py config/mnist_lvae.py --data=mnist
method = 'data'
data = 'mnist'
student_config = {'width': 48}
max_steps = 5000
batch_size = 64
lr = 1e-3
kl_warmup = 1000
save_every = 500
out_dir = 'out/mnist_lvae'
