# The Tiny-ImageNet ResNet-34 of Table I:
# python distill_classifier.py config/teacher_tinyimagenet.py
# The table has 66.44 % on the validation images. tiny-imagenet-200 is the folder that
# cs231n.stanford.edu/tiny-imagenet-200.zip holds. The student that is trained on the data alone
# (64.87 %):
# python distill_classifier.py config/teacher_tinyimagenet.py --student=resnet18 --out_dir=out/student_tinyimagenet_resnet18
method = 'data'
data = 'tiny-imagenet-200/train'
test = 'tiny-imagenet-200/val'
holdout = 0
student = 'resnet34'
width = 0
augment_crop = 8
augment_flip = True
epochs = 200
batch_size = 128
lr = 0.1
weight_decay = 5e-4
out_dir = 'out/teacher_tinyimagenet'
