# The slides' students: 50 epochs on the 1,000 images of config/synth_vae_sd15.py. The rate of Adam is
# not in them; 1e-4 is ours.
# CIFAR-10, CelebA-HQ, and the slides' row with data:
# python distill_vae.py config/vae_slides.py
# python distill_vae.py config/vae_slides.py --teacher=out/vae_celebahq64_teacher/student.safetensors --data=out/synth_vae_celebahq64 --out_dir=out/vae_slides_celebahq64
# python distill_vae.py config/vae_slides.py --data=cifar10 --max_steps=19532 --out_dir=out/vae_slides_data
# The plain VAE of the slides' repository, to one of an eighth of its width:
# python distill_vae.py config/vae_slides.py --teacher=adapters/plain_vae.py:out/vae_cifar10_plain/student.safetensors --student=adapters/plain_vae.py --data=out/synth_vae_cifar10_plain --out_dir=out/vae_slides_plain
teacher = 'out/vae_cifar10_teacher/student.safetensors'
# made by: python distill_vae.py config/vae_cifar10_teacher.py
method = 'synthetic'
data = 'out/synth_vae_cifar10'
max_steps = 391
lr = 1e-4
lr_decay = False
batch_size = 128
out_dir = 'out/vae_slides'
