# CIFAR-10 without a prior: DeepInversion (Yin et al. 2020), the first row of Table I. lr and steps are the method's
# own, the
# weights are ours, not tuned, not run at this size.
teacher = 'out/teacher_cifar10_r34/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar10_r34.py
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
