# Tiny-ImageNet, ResNet-34 to ResNet-18 (Table I). The images and the student:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_tinyimagenet/student.safetensors --num_images=30000 --out_dir=out/synth_tinyimagenet
# python distill_classifier.py config/distill_tinyimagenet.py
# The losses are the paper's, their weights SpaceshipNet's. The temperature, the batch size and the
# epochs are those of the published code (docs/papers.md) for WRN-40-2 to WRN-16-2; the rate and the
# weight decay, which are 0.2 and 5e-4 there, those of the students that it trains between the
# images. Its rate falls tenfold at epochs 150, 180 and 210, and it has no warm-up and no L_mSARC;
# the cosine with a warm-up is ours.
data = 'out/synth_tinyimagenet'
test = 'tiny-imagenet-200/val'
teacher = 'out/teacher_tinyimagenet/student.safetensors'
# made by: python distill_classifier.py config/teacher_tinyimagenet.py
student = 'resnet18'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 8
augment_flip = True
epochs = 240
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/tinyimagenet'
