# Digits without a prior: DeepInversion (Yin et al. 2020) of the bundled classifier. A mirrored
# digit is not a digit, so there are no flips.
# python synthesize.py config/synth_mnist_deepinversion.py
prior = 'none'
steps = 100
alpha = 0.3
beta = 1.0
lr = 0.2
tv = 1.0
keep = 4
keep_every = 10
num_images = 6000
out_dir = 'out/synth_deepinversion'
