# All ten digits from a prior that has seen 0 to 4 only, guided by the bundled classifier. The bundled prior is that of
# python dkdm.py config/mnist_04.py, in half precision.
prior = 'pretrained/mnist_04.safetensors'
num_images = 4000
out_dir = 'out/gap'
