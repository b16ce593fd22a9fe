# All ten digits from a prior that has seen 0 to 4 only, guided by the bundled classifier. The prior
# is that of config/mnist_04.py, in half precision.
# python synthesize.py config/synth_mnist_gap.py
prior = 'pretrained/mnist_04.safetensors'
num_images = 4000
out_dir = 'out/gap'
