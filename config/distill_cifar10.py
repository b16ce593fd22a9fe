# CIFAR-10, ResNet-34 to ResNet-18 (Table I). The images and the student:
# python synthesize.py config/synth_sd15.py
# python distill_classifier.py config/distill_cifar10.py
# VGG-11 to ResNet-18, on the images of that teacher (config/synth_sd15.py has the command):
# python distill_classifier.py config/distill_cifar10.py --teacher=out/teacher_cifar10_vgg11/student.safetensors --data=out/synth_cifar10_vgg11 --out_dir=out/cifar10_vgg11
# The losses are the paper's, their weights SpaceshipNet's. The temperature, the batch size and the
# epochs are those of the published code (docs/papers.md) for WRN-40-2 to WRN-16-2; the rate and the
# weight decay, which are 0.2 and 5e-4 there, those of the students that it trains between the
# images. Its rate falls tenfold at epochs 150, 180 and 210, and it has no warm-up and no L_mSARC;
# the cosine with a warm-up is ours.
data = 'out/synth_cifar10'
test = 'cifar10'
teacher = 'out/teacher_cifar10/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar10.py
student = 'resnet18'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 4
augment_flip = True
epochs = 240
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/cifar10'
