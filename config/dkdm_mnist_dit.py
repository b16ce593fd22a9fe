# Across architectures: the bundled U-Net teaches a transformer. python dkdm.py config/dkdm_mnist_dit.py
student = 'dit'
patch_size = 4
hidden_size = 96
depth = 3
num_heads = 3
out_dir = 'out/dkdm_mnist_dit'
