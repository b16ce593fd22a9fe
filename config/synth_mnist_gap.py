# All ten digits from a prior that has seen 0 to 4 only, guided by the bundled classifier:
# python dkdm.py config/mnist_04.py, then python synthesize.py config/synth_mnist_gap.py
prior = 'out/mnist_04/student.safetensors'
num_images = 4000
out_dir = 'out/gap'
