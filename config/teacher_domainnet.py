# The ResNet-34 of Table II for Clipart:
# python distill_classifier.py config/teacher_domainnet.py
# The table has 67.21 % on the test images. `domainnet` is the folder of ai.bu.edu/M3SDA: a folder
# per domain, and beside them the lists clipart_train.txt and so on. The paper uses "the initial ten
# categories"; these are the ten of the published code (airplane, clock, axe, basketball, bicycle,
# bird, strawberry, flower, pizza, bracelet), which become classes 0 to 9 in this order. Other
# domains likewise, for example Sketch:
# python distill_classifier.py config/teacher_domainnet.py --data=domainnet/sketch_train.txt:1,73,11,19,29,31,290,121,225,39 --test=domainnet/sketch_test.txt:1,73,11,19,29,31,290,121,225,39 --out_dir=out/teacher_domainnet_sketch
# The student that is trained on the data alone (70.65 %):
# python distill_classifier.py config/teacher_domainnet.py --student=torchvision:resnet18 --out_dir=out/student_domainnet_resnet18
method = 'data'
data = 'domainnet/clipart_train.txt:1,73,11,19,29,31,290,121,225,39'
test = 'domainnet/clipart_test.txt:1,73,11,19,29,31,290,121,225,39'
image_size = 224
holdout = 0
student = 'torchvision:resnet34'
width = 0
augment_crop = 28
augment_flip = True
epochs = 200
batch_size = 128
lr = 0.1
weight_decay = 5e-4
out_dir = 'out/teacher_domainnet'
