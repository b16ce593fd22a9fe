# Clipart of DomainNet, ResNet-34 to ResNet-18 (Table II). The images and the student:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_domainnet/student.safetensors --num_images=12000 --out_dir=out/synth_domainnet
# python distill_classifier.py config/distill_domainnet.py
# Another domain, here Sketch, whose images config/synth_sd15.py has the command for:
# python distill_classifier.py config/distill_domainnet.py --teacher=out/teacher_domainnet_sketch/student.safetensors --data=out/synth_domainnet_sketch --test=domainnet/sketch_test.txt:1,73,11,19,29,31,290,121,225,39 --out_dir=out/domainnet_sketch
# The losses are the paper's, their weights SpaceshipNet's. SGD's rate, the weight decay and the
# epochs are those of the published code (docs/papers.md). Its rate falls tenfold at epochs 150, 180
# and 210, and it has no warm-up and no L_mSARC; the cosine with a warm-up is ours.
data = 'out/synth_domainnet'
test = 'domainnet/clipart_test.txt:1,73,11,19,29,31,290,121,225,39'
image_size = 224
teacher = 'out/teacher_domainnet/student.safetensors'
# made by: python distill_classifier.py config/teacher_domainnet.py
student = 'torchvision:resnet18'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 28
augment_flip = True
epochs = 220
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/domainnet'
