# The slides' CIFAR-10 teacher, an LVAE of 5.39 M parameters, by the ELBO:
# python distill_vae.py config/vae_cifar10_teacher.py
method = 'data'
data = 'cifar10'
student_config = {'width': 128}
flip = True
max_steps = 40000
save_every = 1000
batch_size = 128
lr = 1e-3
kl_warmup = 1000
out_dir = 'out/vae_cifar10_teacher'
