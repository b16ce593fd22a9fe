# CIFAR-10, an LVAE of width 128 (5.39 M parameters) to one of width 8 (0.03 M). From noise alone,
# and with data:
# python distill_vae.py config/vae_cifar10.py
# python distill_vae.py config/vae_cifar10.py --method=synthetic --data=cifar10 --out_dir=out/vae_cifar10_data
teacher = 'out/vae_cifar10_teacher/student.safetensors'
# made by: python distill_vae.py config/vae_cifar10_teacher.py
max_steps = 20000
save_every = 1000
out_dir = 'out/vae_cifar10'
