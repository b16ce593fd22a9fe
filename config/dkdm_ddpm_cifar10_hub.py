# CIFAR-10 from the hub, 36 M -> 9 M; export.py makes a DDPMPipeline of the result. The optimisation
# is that of dkdm_cifar10.py, with clipped gradients.
# python dkdm.py config/dkdm_ddpm_cifar10_hub.py
teacher = 'google/ddpm-cifar10-32'
student = 'config/ddpm_cifar10_student.json'
student_prediction = 'teacher'
max_steps = 200000
batch_size = 128
lr = 1e-4
lr_warmup = 0
lr_decay = False
adamw = dict(beta2=0.999, weight_decay=0.0)
ema = 0.9999
log_every = 100
save_every = 10000
sample_steps = 50
out_dir = 'out/dkdm_ddpm_cifar10'
