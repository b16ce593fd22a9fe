# CIFAR-10, WRN-40-2 to WRN-16-1 (Table I). The images and the student:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_cifar10_wrn40_2/student.safetensors --out_dir=out/synth_cifar10_wrn40_2
# python distill_classifier.py config/distill_cifar10_wrn.py
# WRN-40-2 to WRN-16-2, and to WRN-40-1:
# python distill_classifier.py config/distill_cifar10_wrn.py --student=wrn16_2 --out_dir=out/cifar10_wrn16_2
# python distill_classifier.py config/distill_cifar10_wrn.py --student=wrn40_1 --out_dir=out/cifar10_wrn40_1
# The losses are the paper's, their weights SpaceshipNet's. The temperature, SGD's rate and weight
# decay, the batch size and the epochs are those of the published code (docs/papers.md), for
# WRN-16-2. Its rate falls tenfold at epochs 150, 180 and 210, and it has no warm-up and no L_mSARC;
# the cosine with a warm-up is ours.
data = 'out/synth_cifar10_wrn40_2'
test = 'cifar10'
teacher = 'out/teacher_cifar10_wrn40_2/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar10.py --student=wrn40_2 --out_dir=out/teacher_cifar10_wrn40_2
student = 'wrn16_1'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 4
augment_flip = True
epochs = 240
warmup_epochs = 20
batch_size = 256
lr = 0.2
weight_decay = 5e-4
out_dir = 'out/cifar10_wrn16_1'
