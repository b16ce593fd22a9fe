# Across architectures: the bundled U-Net teaches a DiT.
# python dkdm.py config/dkdm_mnist_dit.py
student = 'dit'
student_config = dict(patch_size=4, hidden_size=128, depth=6, num_heads=4)
max_steps = 2500
lr = 2e-3
lr_warmup = 200
out_dir = 'out/dkdm_mnist_dit'
