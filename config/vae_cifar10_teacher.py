# The slides' teachers, LVAEs of width 128, trained by the ELBO. CIFAR-10 (5.39 M parameters), and
# CelebA-HQ at 64x64 (six levels), whose images are in the folder celebahq64, resized to 64x64:
# python distill_vae.py config/vae_cifar10_teacher.py
# python distill_vae.py config/vae_cifar10_teacher.py --data=celebahq64 --out_dir=out/vae_celebahq64_teacher
# The plain VAE of the slides' repository (2.9 M parameters), at its learning rate:
# python distill_vae.py config/vae_cifar10_teacher.py --student=adapters/plain_vae.py --student_config.width=64 --lr=3e-4 --out_dir=out/vae_cifar10_plain
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
