# The slides' CIFAR-10 student: 50 epochs on the 1,000 images of config/synth_cifar10_vae_sd15.py, Adam at 1e-4.
# Their row with data:
# python distill_vae.py config/vae_cifar10_slides.py --data=cifar10 --max_steps=19532 --out_dir=out/vae_cifar10_slides_data
teacher = 'out/vae_cifar10_teacher/student.safetensors'
# made by: python distill_vae.py config/vae_cifar10_teacher.py
method = 'synthetic'
data = 'out/synth_cifar10_vae'
max_steps = 391
lr = 1e-4
lr_decay = False
batch_size = 128
out_dir = 'out/vae_cifar10_slides'
