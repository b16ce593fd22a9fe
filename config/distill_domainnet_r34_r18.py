# A domain of DomainNet, resnet34 -> resnet18 (Table II), on the images of: synthesize.py config/synth_domainnet_sd15.py
# --test=FOLDER of the test images, in a subfolder per class.
# The paper gives the losses; the optimiser's numbers are ours.
data = 'out/synth_domainnet'
teacher = 'domainnet_resnet34.safetensors'
teacher_source = 'it by training: python distill_classifier.py --method=data --data=FOLDER --student=torchvision:resnet34 --out_dir=...; the paper has none to download'
student = 'torchvision:resnet18'
width = 0
augment_crop = 28
augment_flip = True
epochs = 200
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/domainnet_r34_r18'
