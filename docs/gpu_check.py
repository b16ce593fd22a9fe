"""
Checks and times the project on one GPU, in about twelve minutes, and writes all that it finds into
one folder: summary.txt, and the output of each part.

    python docs/gpu_check.py --out_dir=out/gpu_check
    python docs/gpu_check.py --parts=equality,bench    # some of the parts

equality    20 steps of dkdm.py in float32, as they are and as a CUDA graph: the largest differences
fallback    a step that waits for the GPU, and one that cannot be captured, go on without a graph
bench       bench.py at the size of the paper's CIFAR-10 pair
loop        dkdm.py at that size, 300 steps: its own images/s, which should be those of bench
default     python dkdm.py, and the distance of its student
resume      the same run, killed and resumed: the largest difference of the weights
fid         eval_fid.py, 50,000 images of the student of `loop`
layout      bench.py again, with networks that are not channels_last

Without a GPU it runs in tiny sizes, to try the script; its figures mean nothing then.
"""
import os
import sys

out_dir = 'out/gpu_check'
parts = 'equality,fallback,bench,loop,default,resume,fid,layout'
minutes = 10.0               # no part begins after this time
patience = 330               # seconds that one script may take: compiling needs minutes
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
exec(open(os.path.join(_root, 'configurator.py')).read())

import csv
import signal
import subprocess
import time

import torch

os.chdir(_root)
sys.path.insert(0, _root)
import dkdm
import models as M

students = M.adapter('students')
begin = time.time()
tiny = not torch.cuda.is_available()
device = torch.device('cpu' if tiny else 'cuda')
if tiny:
    patience *= 5
size = dict(patch_size=1, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(8,),
            num_head_channels=16)
pair = ['config/dkdm_cifar10.py', '--teacher_config={}']
bench_pair = ['bench.py', 'config/dkdm_cifar10.py', '--teacher_width=128']
if tiny:
    small = '--student_config=' + repr(size | dict(model_channels=16, dropout=0.3))
    pair = [*pair, small, '--batch_size=4', '--compile=False', '--rho=0.002']
    bench_pair = ['bench.py', small, '--image_size=16', '--batch_size=2', '--repeats=1']


def say(line):
    print(line, flush=True)
    with open(os.path.join(out_dir, 'summary.txt'), 'a') as f:
        f.write(line + '\n')


def run(name, *command):
    """The output of a script, which is also written to NAME.txt."""
    start = time.time()
    path = os.path.join(out_dir, f'{name}.txt')
    with open(path, 'w') as f:
        code = subprocess.call(
            [sys.executable, *command], stdout=f, stderr=subprocess.STDOUT, timeout=patience)
    say(f'{name}: exit code {code}, {time.time() - start:.0f} s')
    with open(path) as f:
        output = f.read()
    graph_lines = [line for line in output.splitlines() if 'not run as a CUDA graph' in line]
    for line in graph_lines:
        say(f'  {line}')
    return output


def rows(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def difference(a, b):
    """The largest absolute difference of two dicts of tensors."""
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


# ==== equality and fallback: a step of dkdm.py on small networks, in this process ====
def twenty_steps(kind, steps=20, extra=lambda: None):
    """The student, its average and the pool after some steps, as dicts of tensors. `kind`: 'plain';
    'tensors': learning rate and decay are tensors on the device; 'graph'."""
    torch.manual_seed(0)
    nets = []
    for width, dropout in ((32, 0.0), (16, 0.3)):
        config = size | dict(model_channels=width, dropout=dropout)
        net = students.build_denoiser('unet', 16, 3, 4, config=config)
        for p in net.parameters():
            if p.abs().sum() == 0:  # layers that begin at zero would hide differences
                p.data.normal_(0, 0.02)
        nets.append(net.to(device, memory_format=M.memory_format(device)))
    net_T, net = nets
    net_ema = students.build_denoiser(
        'unet', 16, 3, 4, config=size | dict(model_channels=16, dropout=0.3))
    net_ema = net_ema.to(device, memory_format=M.memory_format(device)).requires_grad_(False)
    net_ema.load_state_dict(net.state_dict())
    teacher = M.make_teacher(net_T.eval().requires_grad_(False), 2.0)
    diffusion, diffusion_S = M.Diffusion(), M.Diffusion(prediction='v')
    labels = M.make_labels(4, 0.1, device)
    pool = dkdm.Pool(64, (3, 16, 16), diffusion, labels, device)
    pool.t = torch.randint(diffusion.T, pool.t.shape, device=device)
    opt = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
    decay = 0.9 if kind == 'plain' else torch.full((), 0.9, device=device)

    def step():
        terms = dkdm.distill_step(net, teacher, pool, diffusion_S, 8, stride=40)
        extra()
        terms['grad_norm'] = M.optimizer_step(net, opt, 1.0)
        M.update_ema(net_ema, net, decay)
        return terms

    graphed = M.Graphed(step, device, kind == 'graph', opt)
    if kind == 'tensors':
        for group in opt.param_groups:
            group['capturable'] = True
    meter = M.Meter(device)
    for k in range(steps):
        M.set_learning_rate(opt, 1e-3 * M.learning_rate_factor(k, steps))
        meter.add(graphed())
    sums = {name: value.cpu() for name, value in meter.sums.items()}
    was_graph = graphed.graph is not None
    weights = {k: v.detach().clone() for k, v in net.state_dict().items()}
    average = {k: v.detach().clone() for k, v in net_ema.state_dict().items()}
    walks = {'x': pool.x.clone(), 't': pool.t.clone(), 'y': pool.y.clone()}
    return was_graph, dict(student=weights, average=average, pool=walks, losses=sums)


def compare(title, one, other):
    found = {name: difference(one[name], other[name]) for name in one}
    cells = ', '.join(f'{name} {value:.3g}' for name, value in found.items())
    say(f'  {title}: largest differences: {cells}')


def equality():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    _, plain = twenty_steps('plain')
    _, again = twenty_steps('plain')
    was_graph, graph = twenty_steps('graph')
    compare('plain and plain again (what is not deterministic)', plain, again)
    if not tiny:  # CPUs have no capturable optimiser
        _, tensors = twenty_steps('tensors')
        compare('graph and plain with tensors (0: to the bit)', tensors, graph)
    compare('graph and plain', plain, graph)
    say(f'  the graph was {"used" if was_graph else "NOT USED"}')


def fallback():
    _, plain = twenty_steps('plain')
    ways = {'a step that waits': lambda: torch.ones((), device=device).item()}
    if not tiny:
        # not found before the capture, which it breaks
        ways['a step that cannot be captured'] = torch.cuda.synchronize
    for title, extra in ways.items():
        was_graph, other = twenty_steps('graph', extra=extra)
        compare(f'{title}, graph {"used" if was_graph else "not used"}', plain, other)


# ==== whole scripts ====
def bench():
    say(run('bench', *bench_pair))


def layout():
    say(run(
        'layout', *bench_pair, '--layout=contiguous_format', '--multiples=1',
        f'--variants={"eager" if tiny else "graph,both"}'
    ))


def loop():
    torch.manual_seed(0)
    config = size | dict(model_channels=16) if tiny else dict(
        model_channels=128, patch_size=1, num_res_blocks=3, channel_mult=(1, 2, 2, 2),
        attention_resolutions=(16, 8), num_head_channels=32)
    path = os.path.join(out_dir, 'teacher.safetensors')
    M.save_model(students.build_denoiser('unet', 32, 3, 0, config=config), path, M.Diffusion())
    steps = 4 if tiny else 300
    folder = os.path.join(out_dir, 'loop')
    run(
        'loop', 'dkdm.py', *pair, f'--teacher={path}', f'--out_dir={folder}', '--rho=0.02',
        '--warmup_steps=4', f'--max_steps={steps}', f'--log_every={max(1, steps // 6)}',
        '--init_from=overwrite', '--sample_steps=4', *(['--rho=0.002'] if tiny else [])
    )
    log = rows(os.path.join(folder, 'log.csv'))
    first, last = log[len(log) // 2 - 1], log[-1]  # the first half compiles and captures
    images = (int(last['step']) - int(first['step'])) * (4 if tiny else 128)
    seconds = float(last['seconds']) - float(first['seconds'])
    say(f'  {images / max(1e-9, seconds):,.0f} images/s in the second half')


short = ['--max_steps=6', '--stride=500', '--log_every=1', '--sample_steps=1'] if tiny else []


def default():
    folder = os.path.join(out_dir, 'default')
    run('default', 'dkdm.py', f'--out_dir={folder}', '--init_from=overwrite', *short)
    last = rows(os.path.join(folder, 'log.csv'))[-1]
    say(f'  step {last["step"]}, loss {last["loss"]}, {last["seconds"]} s with the pool')
    found = run(
        'distance', 'eval_fid.py', f'--models={folder}/student.safetensors',
        f'--out_dir={out_dir}/eval', *(['--num_samples=20', '--n_two_sample=0'] if tiny else [])
    )
    say(found)


def resume():
    folder = os.path.join(out_dir, 'resumed')
    log = os.path.join(folder, 'log.csv')
    command = [sys.executable, 'dkdm.py', f'--out_dir={folder}', *short]
    with open(os.path.join(out_dir, 'killed.txt'), 'w') as f:
        killed = subprocess.Popen(
            [*command, '--init_from=overwrite'], stdout=f, stderr=subprocess.STDOUT)
        for _ in range(10 * patience):
            time.sleep(0.1)
            if killed.poll() is not None or os.path.exists(log) and len(rows(log)) > 2:
                break
        killed.send_signal(signal.SIGTERM)
        code = killed.wait(patience)
    say(f'  killed: exit code {code}, after step {rows(log)[-1]["step"]}')
    run('resumed', 'dkdm.py', f'--out_dir={folder}', *short, '--init_from=resume')
    one, _ = M.read_weights(os.path.join(out_dir, 'default', 'student.safetensors'))
    other, _ = M.read_weights(os.path.join(folder, 'student.safetensors'))
    say(f'  largest difference from the run that was not killed: {difference(one, other):.3g}')


def fid():
    n = 20 if tiny else 50000
    found = run(
        'fid', 'eval_fid.py', f'--models={out_dir}/loop/student.safetensors', f'--num_samples={n}',
        f'--batch_size={10 if tiny else 500}', '--steps=8', '--n_two_sample=0',
        f'--out_dir={out_dir}/eval'
    )
    say(found)


os.makedirs(out_dir, exist_ok=True)
name = 'no GPU' if tiny else torch.cuda.get_device_name()
say(f'torch {torch.__version__}, {name}, {time.strftime("%Y-%m-%d %H:%M")}')
for part in parts.split(','):
    if time.time() - begin > 60 * minutes:
        say(f'{part}: skipped, the time is over')
        continue
    say(f'==== {part}')
    start = time.time()
    try:
        globals()[part]()
    except Exception as e:  # the other parts are worth having
        say(f'  FAILED: {type(e).__name__}: {str(e)[:500]}')
    say(f'  {time.time() - start:.0f} s')
