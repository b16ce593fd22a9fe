# The Tiny-ImageNet ResNet-34 of Table I: python distill_classifier.py config/teacher_tinyimagenet_r34.py
# Table I has 66.44 % on the validation images. tiny-imagenet-200 is the folder of
# cs231n.stanford.edu/tiny-imagenet-200.zip.
# The students' row, trained on data alone, is the same command with
#   --student=resnet18 --out_dir=out/student_tinyimagenet_resnet18    (64.87 %)
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
out_dir = 'out/teacher_tinyimagenet_r34'
