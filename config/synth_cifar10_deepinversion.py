# CIFAR-10 without a prior: DeepInversion (Yin et al. 2020), the first row of Table I. lr and steps
# are the method's own, the weights are ours. They are not tuned, and have not been run at this
# size.
# python synthesize.py config/synth_cifar10_deepinversion.py
teacher = 'out/teacher_cifar10/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar10.py
prior = 'none'
steps = 2000
alpha = 1.0
beta = 1.0
lr = 0.1
tv = 0.1
flip = True
keep = 1
batch_size = 256
num_images = 15000
out_dir = 'out/synth_cifar10_deepinversion'
